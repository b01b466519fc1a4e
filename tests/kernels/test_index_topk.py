"""The indexer against plain formulas, its total order, and what it must not see."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.index_topk_ref import index_topk_ref, select_blocks_ref
from pdkv_kernels.paged import BLOCK

from tests.kernels.paged_case import MIXED, make_case, plain_scores


def plain_order(scores: list[float], topk: int, init: int, local: int) -> list[int]:
    """Forced blocks, then by score, ties to the lower id, NaN last; padded to topk."""
    num = len(scores)

    def key(b: int) -> tuple[int, int, float, int]:
        forced = 2 if b < init else 1 if b >= num - local else 0
        lost = scores[b] != scores[b]
        return (-forced, lost and not forced, 0.0 if forced or lost else -scores[b], b)

    chosen = sorted(range(num), key=key)[:topk]
    return chosen + [-1] * (topk - len(chosen))


@pytest.mark.parametrize("init", [0, 1, 2])
@pytest.mark.parametrize("local", [0, 1, 2])
def test_selection_equals_the_plain_formula(init: int, local: int):
    case = make_case(MIXED, seed=init * 3 + local)
    chosen = index_topk_ref(case.index_q, case.index_k, case.queries, 4, init, local)
    assert chosen.dtype == torch.int32
    for row, seq, position in case.rows():
        scores = plain_scores(case, row, seq, position)
        expected = [plain_order(head, 4, init, local) for head in scores.tolist()]
        assert chosen[row].tolist() == expected, (row, seq, position)


def test_each_head_has_winners_of_its_own():
    case = make_case([(8 * BLOCK, 1)])
    keys = torch.zeros(8 * BLOCK + 1, 16)
    for head, block in enumerate([5, 2, 7, 0]):
        keys[block * BLOCK + 17, head] = 3.0
    for position, key in enumerate(keys):
        page = case.queries.page_table[0, position // BLOCK]
        case.index_k[page, position % BLOCK] = key
    chosen = index_topk_ref(torch.eye(16)[None, :4], case.index_k, case.queries, 2, 0, 1)
    assert chosen[0].tolist() == [[8, 5], [8, 2], [8, 7], [8, 0]]


def test_equal_keys_everywhere_choose_the_lowest_blocks():
    case = make_case([(20 * BLOCK, 2)])
    case.index_k.fill_(0.0)
    chosen = index_topk_ref(case.index_q, case.index_k, case.queries, 5, 0, 1)
    assert (chosen == torch.tensor([20, 0, 1, 2, 3])).all()


def test_later_keys_of_the_own_block_do_not_count():
    case = make_case([(3 * BLOCK, 60)])
    last_page = case.queries.page_table[0, 3]
    early = index_topk_ref(case.index_q, case.index_k, case.queries, 2, 0, 0)[:10]
    case.index_k[last_page, 10:60] = 1e6
    assert torch.equal(index_topk_ref(case.index_q, case.index_k, case.queries, 2, 0, 0)[:10], early)


def test_pages_shared_by_two_sequences_give_the_same_choice():
    case = make_case([(900, 2), (900, 2)])
    table = case.queries.page_table.clone()
    table[1] = table[0]
    queries = replace(case.queries, page_table=table)
    chosen = index_topk_ref(torch.cat([case.index_q[:2]] * 2), case.index_k, queries, 3, 0, 1)
    assert torch.equal(chosen[:2], chosen[2:])


def test_chunks_choose_what_the_whole_prompt_chooses():
    case = make_case([(0, 600)])
    whole = index_topk_ref(case.index_q, case.index_k, case.queries, 2, 0, 1)
    for begin, end in [(0, 100), (100, 129), (129, 500), (500, 600)]:
        queries = replace(
            case.queries,
            query_starts=torch.tensor([0, end - begin], dtype=torch.int32),
            context_lens=torch.tensor([begin], dtype=torch.int32),
        )
        part = index_topk_ref(case.index_q[begin:end], case.index_k, queries, 2, 0, 1)
        assert torch.equal(part, whole[begin:end])


def test_nan_keys_make_a_block_the_last_choice_but_a_valid_one():
    case = make_case([(6 * BLOCK, 1)])
    case.index_k[case.queries.page_table[0, 2], 5] = torch.nan
    chosen = index_topk_ref(case.index_q, case.index_k, case.queries, 8, 0, 1)[0]
    assert (chosen[:, 6] == 2).all()
    assert (chosen[:, 7] == -1).all()
    assert (index_topk_ref(case.index_q, case.index_k, case.queries, 6, 0, 1) != 2).all()


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 1.0, 1.0, 1.0], [0, 1, 2]),
        ([0.0, -0.0, 0.0, -0.0], [0, 1, 2]),
        ([-0.0, 0.0, -0.0, 1e-45], [3, 0, 1]),
        ([torch.nan, -torch.inf, torch.nan, -3e38], [3, 1, 0]),
        ([torch.inf, torch.nan, torch.inf, 3e38], [0, 2, 3]),
        ([-torch.inf] * 4, [0, 1, 2]),
        ([torch.nan] * 4, [0, 1, 2]),
        ([-1.0, -2.0, -1.5, -0.5], [3, 0, 2]),
    ],
)
def test_total_order(scores: list[float], expected: list[int]):
    assert select_blocks_ref(torch.tensor(scores), torch.tensor(4), 3, 0, 0).tolist() == expected


def test_negative_nan_is_lowest_too():
    negative_nan = torch.tensor([-4194304], dtype=torch.int32).view(torch.float32)
    scores = torch.cat((negative_nan, torch.tensor([-torch.inf])))
    assert select_blocks_ref(scores, torch.tensor(2), 2, 0, 0).tolist() == [1, 0]


def test_forced_blocks_use_up_places_and_need_no_score():
    scores = torch.tensor([torch.nan, 9.0, 8.0, 7.0, torch.nan, 99.0])
    chosen = select_blocks_ref(scores, torch.tensor(5), 3, 1, 1)
    assert chosen.tolist() == [0, 4, 1]


def test_invisible_blocks_are_never_chosen_whatever_they_score():
    scores = torch.full((1, 6), torch.inf)
    assert select_blocks_ref(scores, torch.tensor([2]), 4, 0, 1).tolist() == [[1, 0, -1, -1]]


def test_fewer_blocks_than_places_are_padded():
    case = make_case([(0, 3)])
    chosen = index_topk_ref(case.index_q, case.index_k, case.queries, 16, 0, 1)
    assert (chosen[..., 0] == 0).all()
    assert (chosen[..., 1:] == -1).all()
