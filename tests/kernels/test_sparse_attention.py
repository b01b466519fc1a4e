"""Attention to selected blocks against the plain formula, one row at a time."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.index_topk_ref import index_topk_ref
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.sparse_attention_ref import sparse_attention_ref

from tests.kernels.paged_case import MIXED, PagedCase, make_case, plain_attention

SCALE = 16**-0.5


def check(case: PagedCase, blocks: torch.Tensor, tolerance: float = 2e-5) -> None:
    out, lse = sparse_attention_ref(case.q, case.kv, blocks, case.queries, SCALE)
    for row, seq, position in case.rows():
        visible = torch.zeros(blocks.shape[1], position + 1, dtype=torch.bool)
        for head, ids in enumerate(blocks[row].tolist()):
            for block in ids:
                if block >= 0:
                    visible[head, block * BLOCK : (block + 1) * BLOCK] = True
        expected, expected_lse = plain_attention(case, row, seq, position, visible, SCALE)
        torch.testing.assert_close(out[row].double(), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(lse[row].double(), expected_lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(8, 4), (4, 4), (6, 1), (3, 3)])
def test_equals_the_plain_formula(num_heads: int, kv_heads: int):
    case = make_case(MIXED, num_heads=num_heads, kv_heads=kv_heads)
    check(case, index_topk_ref(case.index_q, case.index_k, case.queries, 3, 0, 1))


def test_many_rows_of_one_block_span_several_tiles():
    case = make_case([(1000, 260)])
    blocks = torch.tensor([9, 0, -1], dtype=torch.int32).expand(260, 4, 3).clone()
    blocks[:, 2] = torch.tensor([7, 9, 3])
    blocks[:, :, 0] = ((1000 + torch.arange(260)) // BLOCK)[:, None]
    blocks[blocks[:, :, 1] == blocks[:, :, 0]] = torch.tensor([0, -1, -1], dtype=torch.int32)
    check(case, blocks)


def test_bfloat16_pages_are_widened_before_any_sum():
    case = make_case(MIXED, dtype=torch.bfloat16)
    check(case, index_topk_ref(case.index_q, case.index_k, case.queries, 3, 0, 1))


def test_holes_order_and_unseen_blocks_do_not_matter():
    case = make_case([(700, 5)])
    tidy = torch.tensor([5, 2, 0, -1, -1], dtype=torch.int32).expand(5, 4, 5)
    untidy = torch.tensor([-1, 0, 6, 2, 5], dtype=torch.int32).expand(5, 4, 5)
    expected = sparse_attention_ref(case.q, case.kv, tidy, case.queries, SCALE)
    for one, other in zip(sparse_attention_ref(case.q, case.kv, untidy, case.queries, SCALE), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_all_blocks_chosen_is_dense_attention():
    case = make_case(MIXED)
    blocks = index_topk_ref(case.index_q, case.index_k, case.queries, 16, 0, 1)
    sparse = sparse_attention_ref(case.q, case.kv, blocks, case.queries, SCALE)
    for one, other in zip(sparse, paged_attention_ref(case.q, case.kv, case.queries, SCALE), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_row_without_blocks_gives_zero_and_its_neighbours_are_unharmed():
    case = make_case([(300, 3)])
    blocks = torch.tensor([2, 0], dtype=torch.int32).expand(3, 4, 2).clone()
    whole, _ = sparse_attention_ref(case.q, case.kv, blocks, case.queries, SCALE)
    blocks[1] = -1
    out, lse = sparse_attention_ref(case.q, case.kv, blocks, case.queries, SCALE)
    assert (out[1] == 0).all()
    assert (lse[1] == -torch.inf).all()
    torch.testing.assert_close(out[[0, 2]], whole[[0, 2]])


def test_no_choice_at_all_and_no_rows_at_all():
    case = make_case([(300, 2)])
    out, _ = sparse_attention_ref(case.q, case.kv, torch.full((2, 4, 2), -1, dtype=torch.int32), case.queries, SCALE)
    assert (out == 0).all()
    empty = replace(case.queries, query_starts=torch.zeros(2, dtype=torch.int32))
    out, lse = sparse_attention_ref(case.q[:0], case.kv, torch.empty(0, 4, 2, dtype=torch.int32), empty, SCALE)
    assert out.shape == (0, 8, 16)
    assert lse.shape == (0, 8)


def test_huge_logits_do_not_overflow():
    case = make_case([(500, 2)])
    big = replace(case, q=case.q * 1e4)
    check(big, index_topk_ref(case.index_q, case.index_k, case.queries, 2, 0, 1), tolerance=0.5)


def test_scales_of_each_token_and_head():
    case = make_case([(400, 40), (129, 1)])
    blocks = index_topk_ref(case.index_q, case.index_k, case.queries, 2, 0, 1)
    expected = sparse_attention_ref(case.q, case.kv, blocks, case.queries, SCALE)
    factor = torch.exp2(torch.randint(-6, 7, case.kv.k.shape[:3]).float())
    scaled = PagedKv(case.kv.k * factor[..., None], case.kv.v * factor[..., None], 1 / factor, 1 / factor)
    for one, other in zip(sparse_attention_ref(case.q, scaled, blocks, case.queries, SCALE), expected, strict=True):
        torch.testing.assert_close(one, other)
