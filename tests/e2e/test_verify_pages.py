"""``--verify-pages`` of a decode worker: real processes answer as without, and count what they compared."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import LONG, Trio, ask, router, running, token_ids, transfer_facts, wait_until, worker

REGIONS = {"k": 4 * 4, "v": 4 * 4, "index_k": 3}
"""Layers and heads of each."""


@pytest.fixture(params=["sample", "full"])
def verifying(
    request: pytest.FixtureRequest, three: Trio, link_chasing_model: Path, tmp_path: Path
) -> Iterator[tuple[str, Trio]]:
    """Another decode worker and router for the prefill worker of ``three``."""
    flags = ("--max-model-len", "8192", "--verify-pages", request.param)
    decode = worker("decode", link_chasing_model, tmp_path, *flags)
    front = router(tmp_path, [three.prefill], [decode])
    with running(decode), running(front):
        yield request.param, Trio(three.prefill, decode, front)


def checks(trio: Trio, result: str) -> dict[str, float]:
    found = trio.decode.metrics()
    return {name: found[f"pdkv_kv_digest_checks_total{{region={name},result={result}}}"] for name in REGIONS}


def test_the_answer_is_right_and_the_comparisons_are_counted(verifying: tuple[str, Trio]) -> None:
    verify, trio = verifying
    before = trio.prefill.metrics()["pdkv_kv_digest_duration_seconds_count"]
    prompt = make_prompt(3100, LONG)
    answer = ask(trio.router.url, prompt.token_ids, 24)
    assert token_ids(answer) == list(prompt.expected(24))
    assert transfer_facts(answer)["num_pages"] == 27
    compared = checks(trio, "ok")
    for name, each in REGIONS.items():
        full = 27 * each
        assert compared[name] == full if verify == "full" else each <= compared[name] <= each + full // 8
    again = ask(trio.router.url, [*prompt.token_ids, *prompt.expected(10)], 8)
    assert token_ids(again) == list(prompt.expected(18)[10:])
    assert transfer_facts(again)["num_pages"] == 1, "of what decode kept nothing is read again"
    added = {name: count - compared[name] for name, count in checks(trio, "ok").items()}
    assert added == REGIONS, "the last page in any case, and no other"
    assert checks(trio, "mismatch") == dict.fromkeys(REGIONS, 0)
    assert trio.prefill.metrics()["pdkv_kv_digest_duration_seconds_count"] > before
    wait_until(lambda: trio.prefill.holds_nothing() and trio.decode.holds_nothing(), "all is let go")
