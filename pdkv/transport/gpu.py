"""What the nvlink transport asks of a GPU: map a peer's memory, copy spans, tell when that has ended."""

from typing import Protocol

import msgspec

from pdkv.schema import Int64Array


class Exported(msgspec.Struct, frozen=True, array_like=True):
    """What another process needs to map an allocation."""

    handle: bytes
    offset: int
    """Bytes from the allocation's start to the memory that was asked about."""


class DriverCalls(msgspec.Struct, frozen=True):
    """What native code needs of NVIDIA's driver for reads: addresses of its functions, and what they are given."""

    push_context: int
    pop_context: int
    memcpy_batch: int
    """0 where the driver has none."""
    memcpy_to_device: int
    launch_kernel: int
    record_event: int
    query_event: int
    wait_for_event: int
    context: int
    kernel: int
    threads: int
    """Of a block of the kernel; a multiple of 32."""
    copy_flags: int
    tells_failed_index: bool
    """``memcpy_batch`` has CUDA 12's form, of one argument more."""


class SpanTable(Protocol):
    """Room for spans, here and on the GPU, for one kernel at a time; used again when that has ended."""

    capacity: int
    numbers: Int64Array
    """[3 x capacity], three numbers a span: where to, where from, how many bytes. Page-locked."""
    device: int
    """Address of as much on the GPU."""


class Gpu(Protocol):
    """One GPU of this process. Handles are plain integers. Any thread may call anything; a stream, an event or a table
    is used by one at a time. Whatever CUDA refuses is a ``TransportError`` that says what it called it."""

    uuid: str
    can_copy_batches: bool
    """Whether the copy engines take many spans in one call here; where they do not, the kernel takes all."""

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

    def make_table(self, capacity: int) -> SpanTable: ...

    def drop_table(self, table: SpanTable) -> None: ...

    def make_event(self) -> int:
        """One that is waited for asleep."""

    def drop_event(self, event: int) -> None: ...

    def calls(self) -> DriverCalls:
        """The first time takes long: the kernel is built. Its driver waits for events so that what was copied before
        them is visible to whatever is launched afterwards."""

    def why(self, code: int, call: str) -> str:
        """What the driver meant by a result that is not 0."""

    def close(self) -> None: ...
