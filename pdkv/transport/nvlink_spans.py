"""Which spans the copy engines take, which the kernel, and in which portions the GPU gets them."""

from collections.abc import Iterator

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, LocalMemory, MemoryDescriptor, ReadBatch
from pdkv.transport.gpu import GpuSpans
from pdkv.transport.ranges import fault_of

try:
    from pdkv.transport._spans import Bounds, Cutter, survey

    _EXTENSION_ERROR: ImportError | None = None
except ImportError as missing:
    _EXTENSION_ERROR = missing

ROW_BYTES = 1 << 20
"""Spans from here on go to the copy engines: no thread block is taken from the model, but 1 us of the driver a span."""

PIECE_BYTES = 64 << 10
"""Most that one warp copies in one go, where there are many: with 16 KiB the host took longer to lay out 3 GB than the
link to carry it."""

FEW_BYTES = 64 << 20
"""Of less than this pieces are an eighth as long, so that a thousand warps have work and end together."""

_MOST_TOGETHER = 8
"""Neighbouring short spans that one warp takes at a time."""


class Seen(msgspec.Struct, frozen=True):
    """What a look at a batch told."""

    fault: str
    """Why it is to be refused; empty when it is not, and only then the rest counts."""
    has_rows: bool = False
    has_fragments: bool = False
    num_bytes: int = 0


def check_extension() -> None:
    """Raises ``TransportError`` when the native half of this module is not there."""
    if _EXTENSION_ERROR is not None:
        raise TransportError(
            f"pdkv's native readers are not built ({_EXTENSION_ERROR}): install pdkv with pip, "
            "or run `python setup.py build_ext --inplace` in a checkout"
        ) from _EXTENSION_ERROR


class SpanBounds:
    """What batches of one peer may touch. Owned by the transport's thread."""

    def __init__(self, theirs: tuple[MemoryDescriptor, ...], ours: tuple[LocalMemory, ...]) -> None:
        self._theirs, self._ours = theirs, ours
        self._bounds = Bounds([m.length for m in theirs], [(m.address, m.length) for m in ours])

    def look(self, batch: ReadBatch, row_bytes: int) -> Seen:
        """At contiguous int64 arrays. Takes a third of a nanosecond a span, for nothing moves before it has ended."""
        fits, has_rows, has_fragments, num_bytes = survey(
            self._bounds, batch.memory, batch.remote, batch.local, batch.length, row_bytes
        )
        if not fits:
            return Seen(fault_of(batch, self._theirs, self._ours) or "a range lies outside registered memory")
        return Seen("", has_rows, has_fragments, num_bytes)


def rows_of(batch: ReadBatch, bases: Int64Array, row_bytes: int) -> GpuSpans:
    """The spans for the copy engines, by addresses; ``bases`` are those of the peer's memories."""
    chosen: slice | Int64Array = slice(None)
    if int(batch.length.min()) < row_bytes:
        chosen = np.flatnonzero(batch.length >= row_bytes)
    return GpuSpans(batch.local[chosen], bases[batch.memory[chosen]] + batch.remote[chosen], batch.length[chosen])


class Fragments:
    """The other spans of one batch, cut into pieces. Belongs to whoever posts it."""

    def __init__(self, batch: ReadBatch, bases: Int64Array, row_bytes: int, num_bytes: int) -> None:
        """``num_bytes``: of the whole batch."""
        self._piece_bytes = PIECE_BYTES if num_bytes >= FEW_BYTES else PIECE_BYTES // 8
        self._cutter = Cutter(
            bases, batch.memory, batch.remote, batch.local, batch.length, row_bytes, self._piece_bytes
        )

    def fill(self, table: Int64Array) -> int:
        """Write the next pieces into ``table`` ([3 x n], three numbers a piece: to, from, bytes); returns how many, and
        fewer than n only at the end."""
        return self._cutter.fill(table)

    def together(self, table: Int64Array) -> int:
        """How many neighbours of the pieces in ``table`` a warp is to take at a time."""
        return max(1, min(_MOST_TOGETHER, self._piece_bytes * (table.size // 3) // int(table[2::3].sum())))


def growing_parts(count: int, first: int, times: int, most: int) -> Iterator[slice]:
    """``count`` things in parts of ``first``, then ``times`` as many each, up to ``most``: the GPU soon has something
    to do, and each part is laid out while it does the one before."""
    begin, size = 0, first
    while begin < count:
        yield slice(begin, min(begin + size, count))
        begin, size = begin + size, min(times * size, most)
