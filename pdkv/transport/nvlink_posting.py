"""Puts one batch on a peer's streams, in parts that grow: the GPU soon has work, and its next before that has ended."""

from collections.abc import Callable

import msgspec

from pdkv.schema import ReadBatch
from pdkv.transport.base import ReadId
from pdkv.transport.gpu import SpanTable
from pdkv.transport.nvlink_peer import NUM_STREAMS, NvlinkPeer, Work
from pdkv.transport.nvlink_spans import Posting

PART_SPANS = 1 << 15
"""Most that is put on a stream at a time: a table of so many is 768 KiB."""

ROW_BYTES = 1 << 20
"""Spans from here on go to the copy engines: no thread block is taken from the model, but 1 us of the driver a span."""

WANTS_TABLE, BAD_SPAN, REFUSED, PEER_ENDED = 1, 2, 3, 4
"""How a posting has ended: ``pdkv_posted``."""


class Pace(msgspec.Struct, frozen=True, array_like=True):
    """How a batch is divided; ``pdkv_pace`` of native/nvlink_posting.h, in its order."""

    row_bytes: int = ROW_BYTES
    """From how many bytes on a span goes to the copy engines."""
    piece_bytes: int = 64 << 10
    """Most that one warp copies in one go, where there is much: with 16 KiB the host took longer to lay out 3 GB than
    the link to carry it."""
    few_bytes: int = 64 << 20
    """Of less than this pieces are an eighth as long, so that a thousand warps have work and end together."""
    first_rows: int = 4
    """What the copy engines get first: the driver takes 1 us or more for each row, and begins when it has been told of
    all."""
    first_fragments: int = 1 << 10
    """Spans of the first part: 5 us to lay out, and 40 us or more of the link."""
    times: int = 4
    """Each part is so many times the one before: it is laid out, or told, in less time than that takes to be copied."""
    most: int = PART_SPANS
    blocks: int = 32
    """Thread blocks of one kernel; one a stream runs at a time."""
    row_streams: int = 2
    """How many of the streams rows take turns on."""


def post(
    read: ReadId, peer: NvlinkPeer, posting: Posting, batch: ReadBatch, take_table: Callable[[], SpanTable]
) -> tuple[Work, int]:
    """Put a batch on the peer's streams; the work, and how that ended. What the driver refuses is the work's error."""
    ended = posting.post(batch.memory, batch.remote, batch.local, batch.length)
    tables = []
    while ended == WANTS_TABLE:
        table = take_table()
        tables.append(table)
        ended = posting.give(table.numbers, table.device)
    error = peer.why(*posting.refusal) if ended == REFUSED else ""
    used = posting.used
    marks = [peer.take_event() if used >> n & 1 else 0 for n in range(NUM_STREAMS)]
    if used and posting.mark(*marks):  # then nothing of that stream can be waited for, or runs any more
        error = error or peer.why(*posting.refusal)
    return Work(read, tuple(filter(None, marks)), tuple(tables), error, posting.num_bytes, posting.begun_ns), ended
