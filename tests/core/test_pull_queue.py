"""The limit on reads, by a scripted clock: never beyond it, never idle below it, everything once and in turn."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from pdkv.core.events import Read
from pdkv.core.pull_queue import PullQueue, PullRate, Slice
from pdkv.core.residency import BlockRange
from pdkv.schema import LayerRange

SLICE_S = 0.005


def read_of(number: int, num_blocks: int, start: int = 0) -> Read:
    pages = tuple(1000 * number + i for i in range(num_blocks))
    return Read(number, BlockRange(start, start + num_blocks), pages, LayerRange(2, 5))


def drained(queue: PullQueue[str], now: float) -> list[tuple[float, str, Slice]]:
    """Everything, by a caller who wakes exactly when he should."""
    found = []
    while (when := queue.next_wakeup()) is not None:
        now = max(now, when)
        found += [(now, owner, piece) for owner, piece in queue.take(now)]
    return found


@given(
    st.sampled_from([1e3, 1e6, 1e9]),
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 3_000_000), st.floats(0, 0.2)), min_size=1, max_size=8),
    st.lists(st.floats(0, 0.05), min_size=1, max_size=20),
)
def test_in_no_stretch_of_time_more_is_taken_than_the_limit(
    rate: float, reads: list[tuple[int, int, float]], lateness: list[float]
) -> None:
    """Whoever comes late catches up by no more than a slice, however late."""
    queue: PullQueue[str] = PullQueue(PullRate(rate))
    now, taken = 100.0, []
    late = itertools.cycle(lateness)
    for number, (blocks, size, pause) in enumerate(reads):
        queue.put(f"t{number % 3}", read_of(number, blocks), size)
        now += pause
        taken += [(now, p.read.blocks.num_blocks * reads[p.read.read][1]) for _, p in queue.take(now)]
    while (when := queue.next_wakeup()) is not None:
        now = max(now, when) + next(late)
        taken += [(now, p.read.blocks.num_blocks * reads[p.read.read][1]) for _, p in queue.take(now)]
    assert sum(size for _, size in taken) == sum(blocks * size for blocks, size, _ in reads)
    largest = max(size for _, size in taken)
    for first in range(len(taken)):
        total = 0
        for when, size in taken[first:]:
            total += size
            allowed = rate * (when - taken[first][0] + SLICE_S) + largest
            assert total <= allowed * (1 + 1e-9) + 1


@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 30), st.integers(1, 5000)), min_size=1, max_size=8),
    st.sampled_from([None, 1e5, 1e7]),
)
def test_every_block_is_posted_once_and_in_order(reads: list[tuple[str, int, int]], rate: float | None) -> None:
    queue: PullQueue[str] = PullQueue(PullRate(rate) if rate else None)
    for number, (owner, blocks, size) in enumerate(reads):
        queue.put(owner, read_of(number, blocks, start=7), size)
    posted: dict[int, list[Slice]] = {}
    order: dict[str, list[int]] = {}
    for _, owner, piece in drained(queue, 0.0):
        posted.setdefault(piece.read.read, []).append(piece)
        order.setdefault(owner, []).append(piece.read.read)
    for number, (owner, blocks, _) in enumerate(reads):
        pieces = posted[number]
        whole = read_of(number, blocks, start=7)
        assert [b for p in pieces for b in range(p.read.blocks.start, p.read.blocks.stop)] == list(range(7, 7 + blocks))
        assert tuple(page for p in pieces for page in p.read.source_pages) == whole.source_pages
        assert all(p.read.layers == whole.layers for p in pieces)
        assert [p.is_last for p in pieces] == [False] * (len(pieces) - 1) + [True]
        assert order[owner] == sorted(order[owner])
        if rate is None:
            assert len(pieces) == 1
    assert queue.next_wakeup() is None


def test_a_caller_on_time_gets_the_whole_rate() -> None:
    queue: PullQueue[str] = PullQueue(PullRate(1e6))
    queue.put("a", read_of(0, 1000), 1000)
    taken = drained(queue, 50.0)
    assert abs(taken[-1][0] - 50.0 - 1.0) < 2 * SLICE_S
    assert max(piece.read.blocks.num_blocks for _, _, piece in taken) == 5


def test_a_long_transfer_does_not_hold_up_a_short_one() -> None:
    queue: PullQueue[str] = PullQueue(PullRate(1e6))
    queue.put("long", read_of(0, 1000), 5000)
    assert [owner for owner, _ in queue.take(1.0)] == ["long"] * 2
    queue.put("short", read_of(1, 2), 5000)
    assert [owner for _, owner, _ in drained(queue, 1.1)][:5] == ["long", "short", "long", "short", "long"]


def test_what_is_dropped_is_not_posted() -> None:
    queue: PullQueue[str] = PullQueue(PullRate(1e6))
    queue.put("a", read_of(0, 100), 5000)
    queue.put("a", read_of(1, 100), 5000)
    queue.put("b", read_of(2, 1), 5000)
    assert next(iter(queue.take(1.0)))[0] == "a"
    assert queue.drop("a") == [0, 1]
    assert queue.drop("a") == []
    assert [(owner, piece.read.read) for _, owner, piece in drained(queue, 1.0)] == [("b", 2)]
    assert queue.next_wakeup() is None
