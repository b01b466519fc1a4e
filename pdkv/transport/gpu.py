"""What the nvlink transport asks of a GPU: map a peer's memory, copy spans, tell when that has ended."""

from typing import Protocol

import msgspec

from pdkv.schema import Int64Array


class GpuSpans(msgspec.Struct, frozen=True):
    """Spans by absolute addresses: three arrays of equal length, one entry a span."""

    to: Int64Array
    source: Int64Array
    length: Int64Array

    @property
    def count(self) -> int:
        return int(self.length.size)

    def part(self, which: slice) -> "GpuSpans":
        return GpuSpans(self.to[which], self.source[which], self.length[which])


class Exported(msgspec.Struct, frozen=True, array_like=True):
    """What another process needs to map an allocation."""

    handle: bytes
    offset: int
    """Bytes from the allocation's start to the memory that was asked about."""


class SpanTable(Protocol):
    """Room for spans, here and on the GPU, for one kernel at a time; used again when that has ended."""

    capacity: int
    numbers: Int64Array
    """[3 x capacity], three numbers a span: where to, where from, how many bytes. Page-locked."""


class Gpu(Protocol):
    """One GPU of this process. Handles are plain integers. Any thread may call anything; a stream, an event or a table
    is used by one at a time. Whatever CUDA refuses is a ``TransportError`` that says what it called it."""

    uuid: str
    can_copy_batches: bool
    """Whether ``copy`` exists here; where it does not, ``gather`` takes all spans."""

    def holds(self, address: int, length: int) -> bool:
        """Whether all of that memory is this GPU's."""

    def export(self, address: int) -> Exported: ...

    def refusal(self, uuid: str) -> str:
        """Why this GPU cannot read the memory of that one; empty when it can, or when only trying would tell."""

    def map(self, handle: bytes) -> int:
        """The address at which this GPU reads the allocation of another process."""

    def unmap(self, address: int) -> None:
        """Waits for kernels and copies that use it."""

    def make_stream(self) -> int: ...

    def drop_stream(self, stream: int) -> None: ...

    def make_table(self, capacity: int) -> SpanTable:
        """The first one takes long: the kernel is built."""

    def drop_table(self, table: SpanTable) -> None: ...

    def copy(self, spans: GpuSpans, stream: int) -> None:
        """Put copies of whole spans on the stream, for the copy engines."""

    def gather(self, table: SpanTable, count: int, together: int, blocks: int, stream: int) -> None:
        """Put a kernel of at most so many thread blocks on the stream that copies the table's first ``count`` spans,
        each shorter than 2 GiB. A warp takes ``together`` neighbours at a time."""

    def mark(self, stream: int) -> int:
        """An event behind all that is on the stream."""

    def wait(self, event: int) -> None:
        """Sleep until the event has happened, without the interpreter's lock, and drop it. What was copied before it is
        visible to whatever is launched afterwards."""

    def close(self) -> None: ...
