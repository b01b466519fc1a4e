"""Which spans the copy engines take, which the kernel, and how the kernel's are cut."""

import msgspec
import numpy as np

from pdkv.transport.gpu import GpuSpans

ROW_BYTES = 1 << 20
"""Spans from here on go to the copy engines: no thread block is taken from the model, but 0.3 us a span."""

PIECE_BYTES = 16 << 10
"""What one warp copies in one go: small enough that all end together, large enough that spans are few."""


class Split(msgspec.Struct, frozen=True):
    """One batch, by who carries it."""

    rows: GpuSpans
    pieces: GpuSpans


def split(spans: GpuSpans, row_bytes: int = ROW_BYTES, piece_bytes: int = PIECE_BYTES) -> Split:
    """Spans of at least ``row_bytes`` as they are, all others cut into pieces of at most ``piece_bytes``."""
    is_row = spans.length >= row_bytes
    if not is_row.any():
        return Split(spans.part(0, 0), cut(spans, piece_bytes))
    if is_row.all():
        return Split(spans, spans.part(0, 0))
    return Split(spans.where(is_row), cut(spans.where(~is_row), piece_bytes))


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
