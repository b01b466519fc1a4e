"""``--verify-pages`` through real engines: whole state answers as without, damaged state never does."""

from pathlib import Path

import pytest

from pdkv.errors import FailureCode, TransferError
from pdkv.schema import VerifyPages
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.pair import DividedPair
from pdkv.verify.tampering import Kind, Mutation

LENGTH = 700
SHORT = 300
"""Tokens of two whole pages and a part."""
STORED = {"kv_dtype": "fp8", "index_dtype": "fp8"}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return directory


@pytest.mark.parametrize("verify", [VerifyPages.SAMPLE, VerifyPages.FULL])
@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (4, 2)])
def test_ranks_and_scales_answer_as_without(verify: VerifyPages, prefill: int, decode: int, model_dir: Path) -> None:
    prompt = make_prompt(3, LENGTH)
    ranks = {"prefill_tp": prefill, "decode_tp": decode}
    with DividedPair(model_dir, LENGTH + 8, **ranks, prefill_chunk=256, **STORED, verify_pages=verify) as pair:
        assert pair.ask(prompt.token_ids, 8).token_ids == prompt.expected(8)


@pytest.mark.parametrize("stored", [STORED, {"kv_dtype": "bfloat16", "index_dtype": "bfloat16"}], ids=["fp8", "bf16"])
def test_every_kind_of_region_is_missed_at_once(stored: dict[str, str], model_dir: Path) -> None:
    prompt, other = make_prompt(3, SHORT).token_ids, make_prompt(4, SHORT).token_ids
    regions = ("k", "v", "index_k", *(("k_scale", "v_scale") if stored is STORED else ()))
    with DividedPair(model_dir, SHORT + 8, **stored, verify_pages=VerifyPages.FULL) as pair:
        for mutation in [Mutation(kind, region) for region in regions for kind in Kind]:
            pair.witness.watch(None)
            pair.ask(other, 1)  # what a dropped region leaves in the pages is another request's
            pair.witness.watch(mutation)
            with pytest.raises(TransferError, match=f"of {mutation.region} of layer") as failed:
                pair.ask(prompt, 8)
            assert failed.value.code is FailureCode.DIGEST_MISMATCH


def test_pages_that_differed_are_not_kept_and_cached_ones_are_compared_too(model_dir: Path) -> None:
    prompt, other = make_prompt(5, LENGTH), make_prompt(6, LENGTH)
    for verify in (VerifyPages.OFF, VerifyPages.FULL):
        with DividedPair(model_dir, LENGTH + 20, **STORED, prefix_cache=True, verify_pages=verify) as pair:
            pair.ask(other.token_ids, 1)
            pair.witness.watch(Mutation(Kind.ZERO, "v"))
            if verify is VerifyPages.OFF:
                assert pair.ask(prompt.token_ids, 8).token_ids != prompt.expected(8)
            else:
                with pytest.raises(TransferError):
                    pair.ask(prompt.token_ids, 8)
            pair.witness.watch(None)
            again = pair.ask(prompt.token_ids, 8)
            assert again.report.cached_tokens == LENGTH // 128 * 128, "P has them from the first time"
            if verify is VerifyPages.OFF:
                assert (again.report.resident_pages, again.token_ids == prompt.expected(8)) == (5, False)
                continue
            assert (again.report.resident_pages, again.token_ids) == (0, prompt.expected(8))
            longer = (*prompt.token_ids, *prompt.expected(10))
            more = pair.ask(longer, 4)
            assert (more.report.resident_pages, more.token_ids) == (5, prompt.expected(14)[10:])
