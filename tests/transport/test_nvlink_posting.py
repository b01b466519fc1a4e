"""How the native half of nvlink divides a batch, over a driver that only takes notes."""

import ctypes
import os
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from pdkv.schema import Int64Array, LocalMemory, MemoryDescriptor, ReadBatch
from pdkv.transport.nvlink_posting import BAD_SPAN, PEER_ENDED, REFUSED, WANTS_TABLE, Pace
from pdkv.transport.nvlink_spans import Bounds, Driver, Posting
from pdkv.transport.ranges import fault_of

from .host_gpu import calls_of

BASES = np.array([10_000, 5_000_000])
"""Where the GPU reads the two memories that spans name."""

THEIRS = tuple(MemoryDescriptor(1, size, b"") for size in (1 << 30, 1 << 20))
OURS = (LocalMemory(1 << 40, 1 << 30, "cuda:0"), LocalMemory(1 << 41, 1 << 20, "cuda:0"))
PACE = Pace(row_bytes=1 << 20, first_rows=4, first_fragments=8, times=2, most=64, blocks=4)


class Notes:
    """A driver that does nothing; what it is asked for, in order. Owns the posting that asks."""

    def __init__(self, pace: Pace = PACE, capacity: int = 1000) -> None:
        self.made: list[tuple[str, int, list[list[int]]]] = []
        """("rows" or "fragments", stream, three numbers a span)."""
        self.num_long: list[int] = []
        self.blocks: list[int] = []
        self.refuses = ""
        self.life, self._other = os.pipe()
        self._table: Int64Array = np.zeros(3 * capacity, dtype=np.int64)
        self._sent: list[list[int]] = []
        self._driver = Driver(calls_of(self))
        bounds = Bounds([m.length for m in THEIRS], [(m.address, m.length) for m in OURS])
        self.posting = Posting(self._driver, bounds, BASES, msgspec.structs.astuple(pace), (1, 2), self.life)

    def post(self, batch: ReadBatch) -> int:
        ended = self.posting.post(batch.memory, batch.remote, batch.local, batch.length)
        while ended == WANTS_TABLE:
            self._table[:] = -1
            ended = self.posting.give(self._table, 77)
        return ended

    def spans(self, kind: str) -> list[list[int]]:
        return [span for what, _, spans in self.made for span in spans if what == kind]

    def end_of_the_peer(self) -> None:
        os.write(self._other, b"x")

    def close(self) -> None:
        os.close(self.life)
        os.close(self._other)

    # ---- the driver, as native code calls it ----

    def push_context(self, _context: int) -> int:
        return 0

    def pop_context(self, _popped: int) -> int:
        return 0

    def memcpy_batch(self, to: int, source: int, length: int, count: int, *rest: int) -> int:
        columns = [np.array((ctypes.c_int64 * count).from_address(address)) for address in (to, source, length)]
        self.made.append(("rows", rest[-1], np.stack(columns, axis=1).tolist()))
        return 0

    def memcpy_to_device(self, to: int, source: int, length: int, _stream: int) -> int:
        assert to == 77
        self._sent = np.array((ctypes.c_int64 * (length // 8)).from_address(source)).reshape(-1, 3).tolist()
        return 0

    def launch_kernel(self, _kernel: int, blocks: int, _y: int, _z: int, _threads: int, *rest: int) -> int:
        if self.refuses == "launch_kernel":
            return 7
        table, num_long, count = (ctypes.c_uint64 * 3).from_address(rest[4])
        assert ctypes.c_uint64.from_address(table).value == 77
        assert ctypes.c_uint.from_address(count).value == len(self._sent)
        self.num_long.append(ctypes.c_uint.from_address(num_long).value)
        self.blocks.append(blocks)
        self.made.append(("fragments", rest[3], self._sent))
        return 0

    def record_event(self, _event: int, _stream: int) -> int:
        return 0

    query_event = wait_for_event = push_context


@pytest.fixture
def notes() -> Iterator[Notes]:
    made = Notes()
    yield made
    made.close()


def batch_of(*spans: tuple[int, int, int, int]) -> ReadBatch:
    """(memory, remote, offset in the first own memory, length) each."""
    memory, remote, local, length = (np.array(column, dtype=np.int64) for column in zip(*spans, strict=True))
    return ReadBatch(memory, remote, local + OURS[0].address, length)


def alike(count: int, length: int) -> ReadBatch:
    starts = np.arange(count, dtype=np.int64) * length
    return ReadBatch(np.zeros_like(starts), starts, starts + OURS[0].address, np.full_like(starts, length))


@pytest.mark.parametrize("capacity", [1, 3, 100])
def test_cutting_keeps_every_byte_and_leaves_rows_out(capacity: int) -> None:
    few = PACE.piece_bytes // 8
    spans = [(0, 5000, 100, 7), (1, 10, 300, few), (0, 20, 70_000, few + 1), (1, 0, 0, 3 * few), (0, 9, 6, 3 * few - 1)]
    notes = Notes(msgspec.structs.replace(PACE, row_bytes=3 * few), capacity)
    assert notes.post(batch_of(*spans)) == 0
    wanted = []
    for memory, remote, local, length in spans:
        if length < 3 * few:
            source, to = int(BASES[memory]) + remote, OURS[0].address + local
            wanted += [[to + at, source + at, min(few, length - at)] for at in range(0, length, few)]
    assert sorted(notes.spans("fragments")) == sorted(wanted)
    assert notes.spans("rows") == [[OURS[0].address, 5_000_000, 3 * few]]
    notes.close()


def test_short_pieces_come_last(notes: Notes) -> None:
    """So that every warp gets as many of them as the others, and of longer ones."""
    lengths = [512, 513, 16, 9000, 1, 512, 600, 700]
    assert notes.post(batch_of(*((0, 10_000 * i, 10_000 * i, n) for i, n in enumerate(lengths)))) == 0
    ((_, _, made),) = notes.made
    assert [n for _, _, n in made[: notes.num_long[0]]] == [513, 8192, 808, 600, 700]
    assert sorted(n for _, _, n in made[notes.num_long[0] :]) == [1, 16, 512, 512]


def test_much_is_cut_into_longer_pieces_than_little(notes: Notes) -> None:
    """Judged by the spans so far."""
    assert notes.post(alike(100, 4 * PACE.piece_bytes)) == 0  # 26 MB
    assert {length for _, _, length in notes.spans("fragments")} == {PACE.piece_bytes // 8}
    notes.made.clear()
    assert notes.post(alike(300, 4 * PACE.piece_bytes)) == 0
    assert {length for _, _, length in notes.spans("fragments")} == {PACE.piece_bytes}
    assert notes.posting.num_bytes == 1200 * PACE.piece_bytes


@pytest.mark.parametrize(("kind", "length", "first"), [("fragments", 64, 8), ("rows", 1 << 20, 4)])
def test_parts_grow_to_the_most_and_take_turns(notes: Notes, kind: str, length: int, first: int) -> None:
    assert notes.post(alike(300, length)) == 0
    sizes = [len(spans) for _, _, spans in notes.made]
    assert sizes == ([8, 16, 32, 64, 64, 64, 52] if first == 8 else [4, 8, 16, 32, 64, 64, 64, 48])
    streams = [stream for _, stream, _ in notes.made]
    assert streams[::2] == [streams[0]] * len(streams[::2])
    assert streams[1::2] == [3 - streams[0]] * len(streams[1::2])
    assert {what for what, _, _ in notes.made} == {kind}


def test_takes_no_more_blocks_than_there_is_work_for(notes: Notes) -> None:
    assert notes.post(alike(1, 64)) == notes.post(alike(9, 64)) == notes.post(alike(64, 6400)) == 0
    assert notes.blocks == [1, 1, 1, 4, 4, 4, 4], "two warps a block, a long span or four short ones a warp"


def test_finds_bad_spans_as_the_plain_check_does(notes: Notes) -> None:
    """Over thousands of spans of two memories a side, where one is spoilt: each way that can be. What is launched are
    spans before it, of parts that are sound altogether."""
    count = 3000
    random = np.random.default_rng(0)
    memory = (np.arange(count) // 700 % 2).astype(np.int64)
    length = random.integers(1, 2000, count)
    room = np.array([1 << 30, 1 << 20])[memory] - length
    start = np.array([1 << 40, 1 << 41])[memory]
    batch = ReadBatch(memory, random.integers(0, room + 1), start + random.integers(0, room + 1), length)
    assert notes.post(batch) == 0
    assert sum(n for _, _, n in notes.spans("fragments")) == int(length.sum()) == notes.posting.num_bytes
    whole = notes.spans("fragments")
    most, least = (1 << 63) - 1, -(1 << 63)
    bad = {
        "memory": (2, -1, most, least),
        "remote": (-1, 1 << 30, most, least),
        "local": (0, -1, (1 << 40) - 1, (1 << 41) + (1 << 20), most, least),
        "length": (0, -1, (1 << 30) + 1, most, least),
    }
    for name, values in bad.items():
        for value in values:
            which, spoilt = random.integers(0, count), getattr(batch, name).copy()
            spoilt[which] = value
            changed = msgspec.structs.replace(batch, **{name: spoilt})
            notes.made.clear()
            assert notes.post(changed) == BAD_SPAN, (name, value)
            assert fault_of(changed, THEIRS, OURS), (name, value)
            made = notes.spans("fragments")
            assert len(made) <= which
            assert sorted(made) == sorted(whole[: len(made)])


def test_reads_nothing_of_a_peer_that_has_ended(notes: Notes) -> None:
    notes.end_of_the_peer()
    assert notes.post(alike(3, 64)) == PEER_ENDED
    assert (notes.made, notes.posting.used) == ([], 0)


def test_says_which_call_is_refused_and_what_was_used_before(notes: Notes) -> None:
    notes.refuses = "launch_kernel"
    mixed = batch_of((0, 0, 0, 1 << 20), (0, 1 << 20, 1 << 20, 64))
    assert notes.post(mixed) == REFUSED
    assert notes.posting.refusal == (7, "cuLaunchKernel")
    assert notes.posting.used
    notes.refuses = ""
    assert notes.post(mixed) == 0


def test_takes_arrays_of_int64_only(notes: Notes) -> None:
    good = alike(3, 64)
    for bad in (good.length.astype(np.float64), good.length.astype(np.int32), np.repeat(good.length, 2)[::2]):
        with pytest.raises(ValueError, match="int64|contiguous"):
            notes.posting.post(good.memory, good.remote, good.local, bad)
    with pytest.raises(ValueError, match="differ in length"):
        notes.posting.post(good.memory, good.remote, good.local, good.length[:2].copy())
    assert notes.post(good) == 0
