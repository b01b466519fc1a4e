"""What agents tell operators, of real agents: leases that are held, pages that are stranded, peers that come again."""

import contextlib
import time
from collections.abc import Callable, Iterator

import pytest

from pdkv.agent import events as e
from pdkv.agent.lives import Lives
from pdkv.errors import FailureCode
from pdkv.metric_table import (
    HANDSHAKES,
    INCARNATION_CHANGES,
    LEASE_AGE,
    LEASES_EXPIRED,
    NO_CODE,
    PEER_LOSSES,
    PREFILLS_DISCARDED,
)
from pdkv.metrics import Metric
from pdkv.schema import Incarnation, TransferId
from tests.agent.test_agents import transfer_works
from tests.agent.workers import PATIENCE_S, POLICY, AgentSide, DecodeSide, PrefillSide

ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)
PAGES = (3, 4, 9)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def counted(side: AgentSide, metric: Metric, *labels: str) -> float:
    """Observations of a histogram, or a counter's value."""
    found = [s for s in side.statistics().series if (s.name, s.labels) == (metric.name, labels)]
    return sum(sum(series.counts) if series.counts else series.value for series in found)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.01)


def grant(prefill: PrefillSide, decode: DecodeSide) -> None:
    """A lease on three pages that prefill goes on filling."""
    prefill.expect_transfer(ONE)
    decode.fetch(ONE, prefill, (7, 2, 3))
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, PAGES, 0))


def test_a_lease_is_told_with_its_holder_until_it_ends(stack: contextlib.ExitStack) -> None:
    prefill, decode = (stack.enter_context(contextlib.closing(side())) for side in (PrefillSide, DecodeSide))
    grant(prefill, decode)
    told = prefill.statistics()
    (lease,) = told.leases
    assert (lease.transfer, lease.peer) == (ONE, decode.identity.name)
    assert (lease.view.state, lease.view.num_pages) == ("prefilling", len(PAGES))
    assert 0 <= lease.view.age_s < PATIENCE_S
    assert 0 < lease.view.left_s <= POLICY.lease.ttl_s
    assert (told.leases_active, told.pages_stranded) == (1, 0)
    later = prefill.statistics().leases[0].view
    assert later.age_s > lease.view.age_s
    prefill.loop.post(e.FinishPrefill(ONE, 42, -0.5, b""))
    prefill.expect(e.PagesFreed, ONE)
    assert prefill.statistics().leases == ()
    assert counted(prefill, LEASE_AGE) == 1
    assert counted(prefill, LEASES_EXPIRED) == 0


def test_pages_of_a_failed_transfer_are_stranded_until_its_lease_ends(stack: contextlib.ExitStack) -> None:
    prefill, decode = (stack.enter_context(contextlib.closing(side())) for side in (PrefillSide, DecodeSide))
    grant(prefill, decode)
    until(lambda: prefill.statistics().leases_active == 1)
    decode.channel.send = lambda *_: None  # type: ignore[method-assign]  # it hears, and nobody hears it
    prefill.loop.post(e.AbandonTransfer(ONE, FailureCode.CANCELLED, "enough"))
    told = prefill.statistics()
    assert told.pages_stranded == len(PAGES)
    assert told.leases[0].view.state == "failing"
    prefill.expect(e.PagesFreed, ONE)
    assert prefill.statistics().pages_stranded == 0
    assert counted(prefill, LEASES_EXPIRED) == counted(prefill, LEASE_AGE) == 1


def test_what_began_early_and_was_not_asked_for_is_counted(stack: contextlib.ExitStack) -> None:
    prefill = stack.enter_context(contextlib.closing(PrefillSide()))
    prefill.expect_transfer(ONE)
    prefill.loop.post(e.GrantPages(ONE, PAGES, 0))
    prefill.expect(e.PagesFreed, ONE)
    assert counted(prefill, PREFILLS_DISCARDED) == 1
    assert prefill.statistics().leases == ()
    prefill.expect_transfer(TWO)
    prefill.loop.post(e.GrantPages(TWO, PAGES, 0))
    prefill.loop.post(e.AbandonTransfer(TWO, FailureCode.CANCELLED, "enough"))
    prefill.expect(e.PagesFreed, TWO)
    assert counted(prefill, PREFILLS_DISCARDED) == 1, "nobody will ask for that one"


def test_a_peer_that_comes_again_is_a_restart_for_both_sides(stack: contextlib.ExitStack) -> None:
    prefill = PrefillSide(name="p")
    decode = stack.enter_context(contextlib.closing(DecodeSide(name="d")))
    with contextlib.closing(prefill):
        transfer_works(prefill, decode, ONE)
        assert 0 <= decode.statistics().silence_s < PATIENCE_S
        assert prefill.statistics().peers[0].state == "ready"
    until(lambda: not decode.statistics().peers)  # so nothing of that life is left when the next one comes
    assert counted(decode, PEER_LOSSES, "peer_lost") == 1
    assert counted(decode, INCARNATION_CHANGES) == 0
    assert decode.statistics().silence_s == 0
    port = int(prefill.control.rsplit(":", 1)[1])
    again = stack.enter_context(contextlib.closing(PrefillSide(name="p", port=port)))
    transfer_works(again, decode, TWO)
    assert counted(decode, INCARNATION_CHANGES) == 1
    assert counted(decode, HANDSHAKES, "ok", NO_CODE) == 2
    decode.close()
    until(lambda: not again.statistics().peers)
    assert counted(again, PEER_LOSSES, "shutdown") == 1, "it has said so itself"
    reborn = stack.enter_context(contextlib.closing(DecodeSide(name="d")))
    transfer_works(again, reborn, ONE)
    assert counted(again, INCARNATION_CHANGES) == 1


def test_lives_remember_the_peers_that_were_met_last() -> None:
    lives = Lives(most=2)
    first, second = Incarnation(1), Incarnation(2)
    assert [lives.is_another(name, first) for name in ("a", "b", "a")] == [False] * 3
    assert not lives.is_another("c", first), "b was met longest ago, and is forgotten"
    assert not lives.is_another("b", second)
    assert lives.is_another("c", second)
