"""The faults of inproc: on order, from a seed, without a clock, and never a hang for an owner that sleeps on fileno."""

import select

import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, ReadBatch
from pdkv.transport.base import ReadStatus
from pdkv.transport.inproc import Faults, InprocTransport

SPANS, LENGTH = 16, 64


class Pair:
    """A target full of ones and a reader with faults and a zeroed destination."""

    def __init__(self, faults: Faults | None = None) -> None:
        self.source = np.full(SPANS * LENGTH, 1, dtype=np.uint8)
        self.destination = np.zeros(SPANS * LENGTH, dtype=np.uint8)
        self.target, self.reader = InprocTransport(), InprocTransport(faults)
        self.target.register(LocalMemory(self.source.ctypes.data, self.source.size))
        self.reader.register(LocalMemory(self.destination.ctypes.data, self.destination.size))
        self.peer = self.reader.connect(self.target.address())

    def submit(self):
        offsets = np.arange(SPANS, dtype=np.int64) * LENGTH
        return self.reader.submit(
            self.peer,
            ReadBatch(
                memory=np.zeros(SPANS, np.int64),
                remote=offsets,
                local=self.destination.ctypes.data + offsets,
                length=np.full(SPANS, LENGTH, np.int64),
            ),
        )

    def drain(self, count: int):
        """Sleep on fileno as an owner does until ``count`` reads have completed; (completion, polls needed) each."""
        done, polls = [], 0
        while len(done) < count:
            assert select.select([self.reader.fileno()], [], [], 10)[0], "an owner that sleeps on fileno would hang"
            polls += 1
            done += [(completion, polls) for completion in self.reader.poll()]
        return done

    def close(self) -> None:
        self.reader.close()
        self.target.close()


@pytest.fixture
def pair_of():
    pairs: list[Pair] = []

    def make(faults: Faults | None = None) -> Pair:
        pairs.append(Pair(faults))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.close()


def test_delay_counts_polls_and_copies_late(pair_of):
    pair = pair_of(Faults(seed=3, max_delay_polls=20))
    for _ in range(30):
        pair.submit()
    assert not pair.destination.any(), "a delayed batch is copied when it completes"
    done = pair.drain(30)
    assert {polls for _, polls in done} > {1}, "delays differ"
    assert max(polls for _, polls in done) <= 21
    assert not select.select([pair.reader.fileno()], [], [], 0)[0]
    assert pair.destination.all()


def test_reorder_lets_completions_overtake(pair_of):
    pair = pair_of(Faults(seed=1, reorder=0.5))
    reads = [pair.submit() for _ in range(50)]
    done = [completion.read for completion, _ in pair.drain(50)]
    assert done != reads
    assert sorted(done) == reads


def test_truncation_copies_a_part_and_fails(pair_of):
    pair = pair_of(Faults(seed=2, truncate=1.0))
    pair.submit()
    completion, _ = pair.drain(1)[0]
    assert completion.status is ReadStatus.FAILED
    assert "truncation" in completion.error
    copied = int(pair.destination.sum())
    assert 0 < copied < SPANS * LENGTH
    assert copied % LENGTH == 0


def test_failure_copies_nothing(pair_of):
    pair = pair_of(Faults(seed=2, fail=1.0))
    pair.submit()
    assert pair.drain(1)[0][0].status is ReadStatus.FAILED
    assert not pair.destination.any()


def test_same_seed_same_faults(pair_of):
    def story(seed: int):
        pair = pair_of(Faults(seed=seed, max_delay_polls=5, reorder=0.3, fail=0.2, truncate=0.2))
        for _ in range(40):
            pair.submit()
        return pair.drain(40)

    assert story(11) == story(11)
    assert story(11) != story(12)


def test_close_peer_cancels_delayed_reads(pair_of):
    pair = pair_of(Faults(seed=3, max_delay_polls=1000))
    reads = [pair.submit() for _ in range(5)]
    pair.reader.close_peer(pair.peer)
    done = [completion for completion, _ in pair.drain(5)]
    assert [completion.read for completion in done] == reads
    assert {completion.status for completion in done} == {ReadStatus.CANCELLED}
    assert not pair.destination.any()


def test_target_that_closes_fails_delayed_reads(pair_of):
    pair = pair_of(Faults(seed=3, max_delay_polls=3))
    for _ in range(5):
        pair.submit()
    pair.target.close()
    assert {completion.status for completion, _ in pair.drain(5)} == {ReadStatus.FAILED}
    assert not pair.destination.any()


def test_arrays_of_unequal_length_are_an_error(pair_of):
    pair = pair_of()
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(TransportError, match="differ in length"):
        pair.reader.submit(pair.peer, ReadBatch(memory=one, remote=two, local=one, length=one))


def test_calls_after_close_are_errors(pair_of):
    pair = pair_of()
    pair.reader.close()
    with pytest.raises(TransportError, match="closed"):
        pair.submit()
    assert pair.reader.poll() == []
    pair.reader.close_peer(pair.peer)


def test_memory_that_cannot_be_registered(pair_of):
    with pytest.raises(TransportError, match="cannot register"):
        pair_of().reader.register(LocalMemory(4096, 4096, device="cuda:0"))
