"""Idle links: a prefill worker that ends, or is simply no more, leaves nothing behind on decode."""

import contextlib
import time
from collections.abc import Iterator

import pytest

from pdkv.agent import peer_links
from pdkv.schema import TransferId
from tests.agent.test_agents import transfer_works
from tests.agent.workers import PATIENCE_S, DecodeSide, PrefillSide

ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)


@pytest.fixture
def decode() -> Iterator[DecodeSide]:
    side = DecodeSide()
    with contextlib.closing(side):
        yield side


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_links, "ASK_EVERY_S", 0.05)
    monkeypatch.setattr(peer_links, "SILENCE_S", 1.0)


def wait_until_forgotten(decode: DecodeSide) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while decode.statistics().peers:
        assert time.monotonic() < deadline, "decode still keeps a prefill worker that is no more"
        time.sleep(0.01)


def test_a_prefill_worker_that_ends_is_forgotten(decode: DecodeSide) -> None:
    prefill = PrefillSide()
    transfer_works(prefill, decode, ONE)
    assert len(decode.statistics().peers) == 1
    prefill.close()
    wait_until_forgotten(decode)


@pytest.mark.usefixtures("soon")
def test_a_prefill_worker_that_falls_silent_is_forgotten(decode: DecodeSide) -> None:
    prefill = PrefillSide()
    transfer_works(prefill, decode, ONE)
    prefill.channel.send = lambda *_: None  # type: ignore[method-assign]  # as good as dead
    wait_until_forgotten(decode)
    prefill.close()


@pytest.mark.usefixtures("soon")
def test_an_idle_link_that_answers_stays(decode: DecodeSide) -> None:
    prefill = PrefillSide()
    with contextlib.closing(prefill):
        transfer_works(prefill, decode, ONE)
        (before,) = decode.statistics().peers
        answered = prefill.statistics().messages_dropped
        end = time.monotonic() + 3 * peer_links.SILENCE_S
        while time.monotonic() < end:
            assert decode.statistics().peers == (before,)
            time.sleep(0.01)
        assert prefill.statistics().messages_dropped == answered
        transfer_works(prefill, decode, TWO)
