"""Which spans the copy engines take, which the kernel, and how the kernel's are cut."""

from collections.abc import Iterator

import msgspec
import numpy as np

from pdkv.transport.gpu import GpuSpans

ROW_BYTES = 1 << 20
"""Spans from here on go to the copy engines: no thread block is taken from the model, but 0.3 us a span."""

PIECE_BYTES = 64 << 10
"""Most that one warp copies in one go, where there are many: with 16 KiB the host took longer to lay out 3 GB than the
link to carry it."""

FEW_BYTES = 64 << 20
"""Of less than this pieces are an eighth as long, so that a thousand warps have work and end together."""


class Split(msgspec.Struct, frozen=True):
    """One batch, by who carries it."""

    rows: GpuSpans
    pieces: GpuSpans


def split(spans: GpuSpans, row_bytes: int = ROW_BYTES) -> Split:
    """Spans of at least ``row_bytes`` as they are, all others cut into pieces."""
    is_row = spans.length >= row_bytes
    if is_row.all():
        return Split(spans, spans.part(slice(0)))
    rows, fragments = (spans.where(is_row), spans.where(~is_row)) if is_row.any() else (spans.part(slice(0)), spans)
    is_much = int(fragments.length.sum()) >= FEW_BYTES
    return Split(rows, cut(fragments, PIECE_BYTES if is_much else PIECE_BYTES // 8))


def cut(spans: GpuSpans, piece_bytes: int) -> GpuSpans:
    """The same bytes in spans of at most ``piece_bytes``, in the same order."""
    if spans.count == 0 or int(spans.length.max()) <= piece_bytes:
        return spans
    pieces = -(-spans.length // piece_bytes)
    start = np.repeat(np.cumsum(pieces) - pieces, pieces)
    ahead = (np.arange(start.size, dtype=np.int64) - start) * piece_bytes  # of each piece, in its span
    left = np.repeat(spans.length, pieces) - ahead
    return GpuSpans(
        np.repeat(spans.to, pieces) + ahead, np.repeat(spans.source, pieces) + ahead, np.minimum(left, piece_bytes)
    )


def growing_parts(count: int, first: int, times: int, most: int) -> Iterator[slice]:
    """``count`` things in parts of ``first``, then ``times`` as many each, up to ``most``: the GPU soon has something
    to do, and each part is laid out while it does the one before."""
    begin, size = 0, first
    while begin < count:
        yield slice(begin, min(begin + size, count))
        begin, size = begin + size, min(times * size, most)
