"""Agents of workers with several ranks: any number to any other, and what happens when one rank of many fails."""

import contextlib
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from pdkv.agent import events as e
from pdkv.errors import FailureCode
from pdkv.schema import ReadBatch, TransferId
from pdkv.transport.base import PeerId, ReadId
from pdkv.transport.inproc import Faults, InprocTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport
from tests.agent.workers import AgentSide, DecodeSide, PrefillSide, same_bytes

ONE, TWO = TransferId(b"\x01" * 16), TransferId(b"\x02" * 16)
THEIRS, OURS = (3, 4, 9), (7, 2, 3)
Side = TypeVar("Side", bound=AgentSide)
Make = Callable[[Side], Side]


@pytest.fixture
def make() -> Iterator[Make]:
    """Closes sides, and looks whether they crashed, when the test ends."""
    with contextlib.ExitStack() as stack:

        def made(side: Side) -> Side:
            stack.callback(side.close)
            return side

        yield made


def transferred(prefill: PrefillSide, decode: DecodeSide, transfer: TransferId, seed: int = 1) -> e.TransferFacts:
    prefill.write(THEIRS, seed)
    decode.fetch(transfer, prefill, OURS)
    prefill.serve(transfer, THEIRS)
    arrived = decode.expect(e.TransferArrived, transfer)
    assert same_bytes(prefill, THEIRS, decode, OURS)
    assert prefill.expect(e.TransferEnded, transfer).code is None
    prefill.expect(e.PagesFreed, transfer)
    return arrived.facts


@pytest.mark.parametrize(("p", "d"), [(1, 2), (2, 1), (2, 4), (4, 2), (4, 8), (8, 1)])
def test_a_transfer_brings_every_byte_to_every_rank(p: int, d: int, make: Make) -> None:
    prefill = make(PrefillSide(other_transports=[None] * (p - 1)))
    decode = make(DecodeSide(other_transports=[None] * (d - 1)))
    facts = transferred(prefill, decode, ONE)
    assert facts.num_regions == sum(len(arena.layout.slots) for arena in decode.arenas)
    assert facts.num_bytes >= sum(facts.bytes_by_region.values())
    assert sum(facts.bytes_by_region.values()) == 3 * sum(arena.layout.num_bytes for arena in decode.arenas)
    assert 3 * d <= facts.num_spans <= 3 * (d + max(p, d))
    assert decode.statistics().reads_outstanding == 0
    transferred(prefill, decode, TWO, seed=2)


def test_the_path_is_that_of_the_worst_rank(make: Make) -> None:
    over_tcp = UcxOptions(tls="tcp")
    prefill = make(PrefillSide(transport=UcxTransport(over_tcp)))
    decode = make(DecodeSide(transport=UcxTransport(), other_transports=[UcxTransport(over_tcp)], least_path="shm"))
    decode.fetch(ONE, prefill, OURS)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.PROBE
    assert "is tcp, but shm is required" in failed.message


def test_a_rank_of_prefill_without_its_pattern_is_found_by_the_probe(make: Make) -> None:
    prefill = make(PrefillSide(other_transports=[None]))
    prefill.others[0].probe.poison()
    decode = make(DecodeSide(other_transports=[None]))
    decode.fetch(ONE, prefill, OURS)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.PROBE
    wrong = 2 * len(decode.others[0].arena.layout.slots)
    assert f"{wrong} regions came over wrong, first index_k" in failed.message, "rank 0's are right"


@pytest.mark.parametrize("side", ["prefill", "decode"])
def test_a_worker_that_offers_too_few_ranks_is_refused(side: str, make: Make) -> None:
    prefill = make(PrefillSide(other_transports=[None], num_offered=1 if side == "prefill" else None))
    decode = make(DecodeSide(other_transports=[None], num_offered=1 if side == "decode" else None))
    decode.fetch(ONE, prefill, OURS)
    failed = decode.expect_failure(ONE)
    assert failed.code is FailureCode.MANIFEST
    assert f"{side} worker's ranks are no whole" in failed.message


class Failing(InprocTransport):
    """Fails every read behind the first, which is the probe."""

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._faults = Faults(fail=float(self._next_read >= 1))
        return super().submit(peer, batch)


def test_a_read_that_fails_on_one_rank_fails_the_transfer_and_names_the_rank(make: Make) -> None:
    prefill = make(PrefillSide())
    decode = make(DecodeSide(other_transports=[None, Failing(), None]))
    prefill.write(THEIRS, 1)
    decode.fetch(ONE, prefill, OURS)
    prefill.expect_transfer(ONE)
    prefill.expect(e.PrefillWanted, ONE)
    prefill.loop.post(e.GrantPages(ONE, THEIRS, 256))
    failed = decode.expect_failure(ONE)
    assert failed.code in (FailureCode.READ_FAILED, FailureCode.PEER_LOST)
    assert "rank 2: injected failure" in failed.message
    decode.fetch(TWO, prefill, OURS)  # on a link of its own, whose probe fails on that rank
    again = decode.expect_failure(TWO)
    assert again.code is FailureCode.PROBE
    assert "rank 2: injected failure" in again.message
    assert decode.statistics().reads_outstanding == 0


class Holding(InprocTransport):
    """Keeps every read behind the probe to itself until it is closed by force."""

    def __init__(self) -> None:
        super().__init__()
        self.closed_peers = 0

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._faults = Faults(max_delay_polls=(1 << 40) if self._next_read >= 1 else 0)
        return super().submit(peer, batch)

    def close_peer(self, peer: PeerId) -> None:
        self.closed_peers += 1
        super().close_peer(peer)


def test_reads_that_do_not_end_on_one_rank_are_closed_by_force_on_all(make: Make) -> None:
    holding = Holding()
    holding._random.seed(3)
    prefill = make(PrefillSide())
    decode = make(DecodeSide(other_transports=[holding]))
    decode.fetch(ONE, prefill, OURS)
    prefill.serve(ONE, THEIRS)
    while decode.statistics().reads_outstanding == 0:
        pass
    decode.loop.post(e.AbandonTransfer(ONE, FailureCode.CANCELLED, "the client has gone"))
    assert decode.expect(e.TransferFailed, ONE).code is FailureCode.CANCELLED
    decode.expect(e.PagesReturned, ONE)
    assert holding.closed_peers == 1
    assert decode.statistics().reads_outstanding == 0
