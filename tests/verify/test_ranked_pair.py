"""P and D of any numbers of ranks, as threads over ``inproc``: their tokens are the undivided engine's."""

from pathlib import Path

import pytest

from pdkv.m3.model import M3Model, load_model
from pdkv.verify.equality import combine, compare_tokens
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.pair import DividedPair
from pdkv.verify.undivided import complete_with
from tests.checkpoints import Oracle, OracleCase, write_random_checkpoint

PAIRS = [(1, 2), (2, 1), (2, 4), (4, 1), (4, 8)]
LONG = 2200
"""Tokens: beyond 2,048 the selection, and with it the transferred index keys, decides."""


@pytest.fixture(scope="module")
def link_chasing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def undivided(link_chasing_model: Path) -> M3Model:
    return load_model(link_chasing_model)


@pytest.fixture(scope="module")
def unseen_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "random-m3"
    write_random_checkpoint(directory, 4)
    return directory


@pytest.fixture(scope="module")
def case(unseen_model: Path) -> OracleCase:
    return Oracle(unseen_model).case(700, 8, seed=1)


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_any_ranks_to_any_ranks_follow_the_links(
    prefill: int, decode: int, link_chasing_model: Path, undivided: M3Model
) -> None:
    length = LONG if (prefill, decode) == (2, 4) else 300
    prompt = make_prompt(prefill + decode, length)
    with DividedPair(link_chasing_model, length + 8, prefill_tp=prefill, decode_tp=decode) as pair:
        answer = pair.ask(prompt.token_ids, 8)
    assert answer.token_ids == prompt.expected(8)
    assert answer.token_ids == complete_with(undivided, prompt.token_ids, 8, ignore_eos=True).token_ids
    assert answer.report.num_regions == decode * (3 + 4 * 2 * max(1, 4 // decode))


@pytest.mark.parametrize(("prefill", "decode"), PAIRS)
def test_any_ranks_to_any_ranks_answer_as_transformers(
    prefill: int, decode: int, unseen_model: Path, case: OracleCase
) -> None:
    with DividedPair(unseen_model, 710, prefill_chunk=333, prefill_tp=prefill, decode_tp=decode) as pair:
        tokens = list(pair.ask(tuple(case.prompt), 8).token_ids)
    verdict = combine([compare_tokens(tokens, case.tokens, case.logits)])
    print(f"{prefill} -> {decode}: {verdict}")  # noqa: T201  what the equality rule excuses must be reported
    assert verdict.equal, verdict.problems


def test_whole_experts_answer_the_same(unseen_model: Path, case: OracleCase) -> None:
    with DividedPair(unseen_model, 710, prefill_tp=4, decode_tp=2, expert_parallel=True) as pair:
        tokens = list(pair.ask(tuple(case.prompt), 8).token_ids)
    assert combine([compare_tokens(tokens, case.tokens, case.logits)]).equal


def test_a_pair_answers_again_and_again(link_chasing_model: Path) -> None:
    with DividedPair(link_chasing_model, 400, prefill_tp=2, decode_tp=2, prefix_cache=False) as pair:
        for seed in range(3):
            prompt = make_prompt(seed, 200 + 60 * seed)
            assert pair.ask(prompt.token_ids, 4).token_ids == prompt.expected(4)


@pytest.mark.parametrize(("prefill", "decode"), [(2, 4), (4, 2)])
def test_fp8_state_and_its_scales_reach_the_right_ranks(prefill: int, decode: int, link_chasing_model: Path) -> None:
    prompt = make_prompt(11, 300)
    stored = {"kv_dtype": "fp8", "index_dtype": "fp8"}
    with DividedPair(link_chasing_model, 310, prefill_tp=prefill, decode_tp=decode, **stored) as pair:
        answer = pair.ask(prompt.token_ids, 8)
    assert answer.token_ids == prompt.expected(8)
    scales = {answer.report.bytes_by_region[name] for name in ("k_scale", "v_scale")}
    assert scales == {3 * 4 * 4 * 128 * 4}, "pages x layers x heads x tokens x float32"
