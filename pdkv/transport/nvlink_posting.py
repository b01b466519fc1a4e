"""Puts one batch on a peer's streams, in parts that grow: the GPU soon has work, and its next before that has ended."""

from collections.abc import Callable, Iterator
from itertools import zip_longest

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, ReadBatch
from pdkv.transport.base import ReadId
from pdkv.transport.gpu import Gpu, GpuSpans, SpanTable
from pdkv.transport.nvlink_peer import NvlinkPeer, Work
from pdkv.transport.nvlink_spans import Fragments, Seen, growing_parts, rows_of

PART_SPANS = 1 << 15
"""Most that is put on a stream at a time: a table of so many is 768 KiB."""

FIRST_PIECES = 1 << 11
"""Of the first part: 5 us to lay out, and 50 us or more of the link."""

FIRST_ROWS = 16
"""What the copy engines get first: the driver takes 1 us for each row, and begins when it has been told of all."""

TIMES = 4
"""Each part is so many times the one before: it is laid out, or told, in less time than that takes to be copied."""


class Posting:
    """Lives as long as one ``submit``, in the transport's thread."""

    def __init__(self, gpu: Gpu, peer: NvlinkPeer, blocks: int, take_table: Callable[[], SpanTable]) -> None:
        """``blocks``: of one kernel. ``take_table``: one of ``PART_SPANS`` that nothing uses."""
        self._gpu = gpu
        self._peer = peer
        self._blocks = blocks
        self._take_table = take_table
        self._tables: list[SpanTable] = []
        self._streams: set[int] = set()

    def post(self, read: ReadId, batch: ReadBatch, bases: Int64Array, row_bytes: int, seen: Seen) -> Work:
        """All of a sound batch. What the driver refuses is the work's error; parts before that have been put there."""
        rows = rows_of(batch, bases, row_bytes) if seen.has_rows else None
        fragments = Fragments(batch, bases, row_bytes, seen.num_bytes) if seen.has_fragments else None
        error = ""
        try:
            for _ in zip_longest(self._gathers(fragments), self._copies(rows)):  # in turns
                pass
        except TransportError as refused:
            error = str(refused)
        events = []
        for stream in self._streams:
            try:
                events.append(self._gpu.mark(stream))
            except TransportError as refused:  # then nothing of that stream can be waited for, or runs any more
                error = error or str(refused)
        return Work(read, tuple(events), tuple(self._tables), error)

    def _gathers(self, fragments: Fragments | None) -> Iterator[None]:
        """A kernel at each step, behind a table of its own."""
        size, filled = FIRST_PIECES, 0
        while fragments is not None:
            table = self._take_table()
            self._tables.append(table)
            filled = fragments.fill(table.numbers[: 3 * size])
            if not filled:
                return
            together = fragments.together(table.numbers[: 3 * filled])
            self._gpu.gather(table, filled, together, self._blocks, self._next_stream())
            yield
            if filled < size:
                return
            size = min(TIMES * size, PART_SPANS)

    def _copies(self, rows: GpuSpans | None) -> Iterator[None]:
        """A call of the copy engines at each step."""
        for part in growing_parts(rows.count, FIRST_ROWS, TIMES, PART_SPANS) if rows is not None else ():
            assert rows is not None
            self._gpu.copy(rows.part(part), self._next_stream())
            yield

    def _next_stream(self) -> int:
        stream = self._peer.next_stream()
        self._streams.add(stream)
        return stream
