"""Prompts whose answers are known, through router, prefill and decode, around every border of blocks and window."""

import httpx
import pytest

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import LONG, Trio, ask, token_ids, transfer_facts, wait_until


@pytest.mark.parametrize("length", [64, 127, 128, 129, 512, 2048, 2049, 3072])
def test_every_length_answers_its_chain(length: int, three: Trio) -> None:
    prompt = make_prompt(length, length)
    answer = ask(three.router.url, prompt.token_ids, 64 if length >= 512 else 8)
    ids = token_ids(answer)
    assert ids == list(prompt.expected(len(ids)))
    assert answer.json()["usage"]["prompt_tokens"] == length
    wait_until(lambda: three.prefill.holds_nothing() and three.decode.holds_nothing(), "pages back on both sides")


def test_transfer_facts_add_up(three: Trio, long_answer: httpx.Response) -> None:
    assert token_ids(long_answer) == list(make_prompt(5, LONG).expected(24))
    facts = transfer_facts(long_answer)
    bytes_per_page = int(three.decode.info()["bytes_per_token"]) * 128  # type: ignore[call-overload]
    assert facts["num_pages"] == 27
    assert sum(facts["bytes_by_region"].values()) == 27 * bytes_per_page
    assert facts["bytes_by_region"]["index_k"] == 27 * 3 * 128 * 128 * 4
    assert facts["num_spans"] <= 24 + 3 * 4 * (4 + 1)  # the last chunk's pages in layer groups: by head, and the index
    assert facts["path"] == "shm"
