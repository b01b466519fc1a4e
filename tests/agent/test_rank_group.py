"""All ranks as one: an answer comes when the last has reported, sums what can be summed, and hides no error."""

from collections.abc import Iterator

import numpy as np
import pytest

from pdkv.agent.paths import PathRequirement, worst_path
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import (
    CloseLink,
    ConnectLink,
    LinkConnected,
    LinkProbed,
    PagesRead,
    PostedBatch,
    ProbeLink,
    RankOrder,
    RankReads,
    ReadPages,
)
from pdkv.schema import Incarnation, LocalMemory
from pdkv.transport.inproc import InprocTransport
from pdkv.wire.messages import RankOffer
from tests.agent.test_rank_reads import PAGES, NoProbe, small_layout
from tests.layouts import make_manifest, memory_length

ORDERS = (ConnectLink, ReadPages, ProbeLink, CloseLink)


class Told:
    """A group whose rank 0 reads from itself, and whose two other ranks say what the test wants."""

    def __init__(self) -> None:
        manifest = make_manifest(small_layout("bfloat16", "bfloat16"), 0, 1, PAGES)
        self.memory = np.zeros(memory_length(manifest) + manifest.row_padding, dtype=np.uint8)
        self.transport = InprocTransport()
        self.transport.register(LocalMemory(self.memory.ctypes.data, self.memory.nbytes))
        self.offer = RankOffer(manifest, self.transport.address())
        reads = RankReads(self.transport, manifest, NoProbe(), (self.memory.ctypes.data,))
        self.orders: list[tuple[int, RankOrder]] = []
        self.group = RankGroup(reads, [self.carrier(1), self.carrier(2)])

    def carrier(self, rank: int) -> object:
        return lambda order: self.orders.append((rank, order))

    def connected(self) -> int:
        link = self.group.connect(Incarnation(7), (self.offer,))
        for rank in (1, 2):
            self.group.hear(rank, LinkConnected(link, 3, {"k": 10, "index_k": 2}))
        answer = self.group.take()
        assert isinstance(answer, LinkConnected)
        assert answer.num_regions > 6
        assert answer.bytes_by_region["v"] > 0
        assert answer.bytes_by_region["k"] == answer.bytes_by_region["v"] + 20
        return link


@pytest.fixture
def told() -> Iterator[Told]:
    made = Told()
    yield made
    made.transport.close()


def test_orders_go_to_every_rank_and_answers_wait_for_the_last(told: Told) -> None:
    link = told.connected()
    read = told.group.read(link, (1,), (1,))
    told.group.hear(2, PagesRead(link, read, 100, (PostedBatch(1, 0.0),)))
    told.group.on_completions(told.transport.poll())
    assert told.group.take() is None
    assert told.group.num_reads_outstanding == 1
    told.group.hear(1, PagesRead(link, read, 10, (PostedBatch(2, 0.0), PostedBatch(3, 0.0))))
    answer = told.group.take()
    assert isinstance(answer, PagesRead)
    assert answer.error == ""
    assert [batch.num_spans for batch in answer.batches] == [1, 2, 3, 1]
    assert answer.num_bytes > 110
    assert told.group.num_reads_outstanding == 0
    told.group.close(link)
    kinds = {rank: [type(order) for to, order in told.orders if to == rank] for rank in (1, 2)}
    assert kinds[1] == kinds[2] == [ConnectLink, ReadPages, CloseLink]


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_one_rank_that_fails_fails_all(told: Told, failing: int) -> None:
    link = told.connected()
    pages = (PAGES,) if failing == 0 else (1,)
    read = told.group.read(link, pages, (1,))
    told.group.on_completions(told.transport.poll())
    for rank in (1, 2):
        told.group.hear(rank, PagesRead(link, read, 10, (), "no such luck" if rank == failing else ""))
    answer = told.group.take()
    assert isinstance(answer, PagesRead)
    assert answer.error.startswith(f"rank {failing}: ")


def test_reads_of_a_link_that_is_closed_are_still_answered_when_the_last_rank_has_ended(told: Told) -> None:
    link = told.connected()
    read = told.group.read(link, (1,), (1,))
    told.group.close(link)
    told.group.on_completions(told.transport.poll())
    told.group.hear(1, PagesRead(link, read, 0, (), "closed"))
    assert told.group.take() is None, "rank 2 may still be written to"
    told.group.hear(2, PagesRead(link, read, 0, (), "closed"))
    assert isinstance(told.group.take(), PagesRead)


def test_a_probe_is_as_good_as_its_worst_rank(told: Told) -> None:
    group = told.group
    for rank, (path, wrong) in enumerate((("shm", 0), ("tcp", 2), ("rdma", 1))):
        group.hear(rank, LinkProbed(1, path, wrong, f"k of rank {rank}" if wrong else ""))
    assert group.take() == LinkProbed(1, "tcp", 3, "k of rank 1")


@pytest.mark.parametrize(
    ("paths", "worst"),
    [
        (["shm", "cuda_ipc"], "shm"),
        (["rdma", "tcp", "shm"], "tcp"),
        (["rdma", "unknown"], "unknown"),
        (["new"], "new"),
        ([], "unknown"),
        (["inproc", "inproc"], "inproc"),
    ],
)
def test_the_worst_path_counts(paths: list[str], worst: str) -> None:
    assert worst_path(paths) == worst


@pytest.mark.parametrize(("least", "good"), [("rdma", {"rdma", "cuda_ipc", "inproc"}), (None, {"tcp", "unknown"})])
def test_what_is_required_is_allowed(least: str | None, good: set[str]) -> None:
    assert all(PathRequirement(least).allows(path) for path in good)
    assert least is None or not PathRequirement(least).allows("tcp")
