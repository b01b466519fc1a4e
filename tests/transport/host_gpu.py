"""A GPU made of host memory, for what nvlink decides around the driver: memory is memfds, a stream is a thread, and the
gather kernel is the real one, built as C++ and run one thread after another.

It shows nothing about CUDA itself: ``tests/gpu/test_nvlink.py`` does, where there is a GPU.
"""

import ctypes
import mmap
import os
import struct
import subprocess
import tempfile
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import SimpleQueue

import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory
from pdkv.transport.conformance_target import Bytes, SharedArray
from pdkv.transport.cuda_gpu import kernel_source
from pdkv.transport.gpu import Exported, GpuSpans, SpanTable
from pdkv.transport.nvlink import NvlinkTransport

_SHIM = """
struct Place { unsigned x; };
static thread_local Place threadIdx, blockIdx, blockDim, gridDim;
struct alignas(16) uint4 { unsigned x, y, z, w; };
#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(threads)
"""
_RUN = """
extern "C" void run(const Span *spans, unsigned count, unsigned each, unsigned blocks, unsigned threads)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            gather_spans(spans, count, each);
}
"""
_arrays: list[SharedArray] = []
"""What this process's GPU holds; only ever added to."""


@cache
def gather_on_host() -> Callable[[int, int, int, int, int], None]:
    """The kernel: (address of the spans, count, how many a warp takes together, blocks, threads). Words at odd
    addresses are a trap."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "gather.cpp", Path(folder) / "gather.so"
        source.write_text(_SHIM + kernel_source() + _RUN)
        checks = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error", "-Wno-unknown-pragmas"]
        subprocess.run(["g++", "-O2", "-shared", "-fPIC", *checks, source, "-o", library], check=True)
        run = ctypes.CDLL(str(library)).run
    run.argtypes = [ctypes.c_void_p, *[ctypes.c_uint] * 4]
    run.restype = None
    return run


class HostGpuMemory:
    """See ``KitMemory``; says that it is a GPU's."""

    def __init__(self, size: int) -> None:
        array = SharedArray(size)
        _arrays.append(array)
        self.bytes: Bytes = array.bytes
        self.memory = LocalMemory(array.memory.address, size, "cuda:0", array.memory.memfd)

    def look(self, start: int, length: int) -> Bytes:
        return self.bytes[start : start + length]

    def fill(self, values: Bytes | int) -> None:
        self.bytes[:] = values


class _Table:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.numbers = np.zeros(3 * capacity, dtype=np.int64)


class _Stream:
    def __init__(self) -> None:
        self.tasks: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while (task := self.tasks.get()) is not None:
            task()


class HostGpu:
    """See ``Gpu``. ``refuse``: calls that fail, by name. ``gate``: whatever streams do waits until it is set."""

    uuid = "host"

    def __init__(self, can_copy_batches: bool = True) -> None:
        self.can_copy_batches = can_copy_batches
        self.refuse: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.copies: list[tuple[int, int]] = []
        """Of each call of ``copy``: spans and stream."""
        self.gathers: list[tuple[int, int, int, int]] = []
        """Of each call of ``gather``: spans, how many a warp takes at a time, blocks and stream."""
        self.mapped: dict[int, mmap.mmap] = {}
        self._handles: dict[int, object] = {}
        self._next = 1

    def _check(self, call: str) -> None:
        if call in self.refuse:
            raise TransportError(f"CUDA refuses: {call}")

    def _keep(self, what: object) -> int:
        self._next += 1
        self._handles[self._next] = what
        return self._next

    def holds(self, address: int, length: int) -> bool:
        return any(self._lies_in(a, address) and self._lies_in(a, address + length - 1) for a in _arrays)

    @staticmethod
    def _lies_in(array: SharedArray, address: int) -> bool:
        return 0 <= address - array.memory.address < array.memory.length

    def export(self, address: int) -> Exported:
        self._check("export")
        array = next(a for a in _arrays if self._lies_in(a, address))
        handle = struct.pack("<qqq", os.getpid(), array.memory.memfd, array.memory.length)
        return Exported(handle, address - array.memory.address)

    def refusal(self, uuid: str) -> str:
        return "" if uuid == self.uuid else f"no peer access to {uuid}"

    def map(self, handle: bytes) -> int:
        self._check("map")
        pid, fd, length = struct.unpack("<qqq", handle)
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"CUDA refuses: {error}") from error
        mapping = mmap.mmap(own, length)
        os.close(own)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapping))
        self.mapped[address] = mapping
        return address

    def unmap(self, address: int) -> None:
        self.mapped.pop(address)

    def make_stream(self) -> int:
        self._check("make_stream")
        return self._keep(_Stream())

    def drop_stream(self, stream: int) -> None:
        dropped = self._handles.pop(stream)
        assert isinstance(dropped, _Stream)
        dropped.tasks.put(None)

    def make_table(self, capacity: int) -> SpanTable:
        return _Table(capacity)

    def drop_table(self, table: SpanTable) -> None:
        pass

    def _do(self, stream: int, task: Callable[[], None]) -> None:
        owner = self._handles[stream]
        assert isinstance(owner, _Stream)
        owner.tasks.put(lambda: (self.gate.wait(), task())[1])

    def copy(self, spans: GpuSpans, stream: int) -> None:
        self._check("copy")
        self.copies.append((spans.count, stream))
        every = list(zip(spans.to.tolist(), spans.source.tolist(), spans.length.tolist(), strict=True))
        self._do(stream, lambda: [ctypes.memmove(*span) for span in every] and None)

    def gather(self, table: SpanTable, count: int, together: int, blocks: int, stream: int) -> None:
        assert isinstance(table, _Table)
        self._check("gather")
        self.gathers.append((count, together, blocks, stream))
        self._do(stream, lambda: gather_on_host()(table.numbers.ctypes.data, count, together, blocks, 64))

    def mark(self, stream: int) -> int:
        self._check("mark")
        happened = threading.Event()
        self._do(stream, happened.set)
        return self._keep(happened)

    def wait(self, event: int) -> None:
        happened = self._handles.pop(event)
        assert isinstance(happened, threading.Event)
        happened.wait()
        self._check("wait")

    def close(self) -> None:
        assert not self.mapped, "a mapping is left"
        assert not self._handles, "a stream or an event is left"


def make(argument: str) -> NvlinkTransport:
    """Factory for the conformance kit; "gather": a driver that copies no batches."""
    return NvlinkTransport(blocks=3, gpu_of=lambda _address: HostGpu(argument != "gather"))
