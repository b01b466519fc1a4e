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
from pdkv.transport.gpu import DriverCalls, Exported, SpanTable
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
extern "C" void run(const Span *spans, unsigned num_long, unsigned count, unsigned blocks, unsigned threads)
{
    gridDim.x = blocks;
    blockDim.x = threads;
    for (blockIdx.x = 0; blockIdx.x < blocks; blockIdx.x++)
        for (threadIdx.x = 0; threadIdx.x < threads; threadIdx.x++)
            gather_spans(spans, num_long, count);
}
"""
_arrays: list[SharedArray] = []
"""What this process's GPU holds; only ever added to."""


@cache
def gather_on_host() -> Callable[[int, int, int, int, int], None]:
    """The kernel: (address of the spans, how many are not short, how many there are, blocks, threads). Words at odd
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


_REFUSED, _NOT_READY = 999, 600

_POINTER, _UNSIGNED, _SIZE = ctypes.c_size_t, ctypes.c_uint, ctypes.c_size_t
_CALL = {
    name: ctypes.CFUNCTYPE(ctypes.c_int, *arguments)
    for name, arguments in {
        "push_context": (_POINTER,),
        "pop_context": (_POINTER,),
        "memcpy_batch": (_POINTER, _POINTER, _POINTER, _SIZE, _POINTER, _POINTER, _SIZE, _POINTER),
        "memcpy_to_device": (_POINTER, _POINTER, _SIZE, _POINTER),
        "launch_kernel": (_POINTER, *[_UNSIGNED] * 7, _POINTER, _POINTER, _POINTER),
        "record_event": (_POINTER, _POINTER),
        "query_event": (_POINTER,),
        "wait_for_event": (_POINTER,),
    }.items()
}


_kept: list[object] = []
"""Functions that native code calls; only ever added to, for nobody tells when it has called the last time."""


def calls_of(driver: object) -> DriverCalls:
    """The methods of a driver written in Python, as native code calls them. Threads of its kernel's blocks are 64."""
    functions = {name: kind(getattr(driver, name)) for name, kind in _CALL.items()}
    _kept.extend(functions.values())
    addresses = {name: ctypes.cast(function, ctypes.c_void_p).value or 0 for name, function in functions.items()}
    return DriverCalls(**addresses, context=1, kernel=2, threads=64, copy_flags=0, tells_failed_index=False)


def _words(address: int, count: int) -> list[int]:
    return list((ctypes.c_uint64 * count).from_address(address))


class _Table:
    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.numbers = np.zeros(3 * capacity, dtype=np.int64)
        self.on_gpu = np.zeros(3 * capacity, dtype=np.int64)
        self.device = int(self.on_gpu.ctypes.data)


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
        """Of each batch of copies: spans and stream."""
        self.gathers: list[tuple[int, int, int, int]] = []
        """Of each kernel: spans, how many of them are not short, blocks and stream."""
        self.mapped: dict[int, mmap.mmap] = {}
        self._handles: dict[int, object] = {}
        self._next = 1
        self._calls = calls_of(self)

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

    def make_event(self) -> int:
        never_recorded = threading.Event()
        never_recorded.set()
        return self._keep(never_recorded)

    def drop_event(self, event: int) -> None:
        self._handles.pop(event)

    def calls(self) -> DriverCalls:
        return self._calls

    def why(self, code: int, call: str) -> str:
        return f"CUDA refuses: {call}, {code}"

    # ---- the driver, as native code calls it ----

    def _event(self, event: int) -> threading.Event:
        found = self._handles[event]
        assert isinstance(found, threading.Event)
        return found

    def push_context(self, _context: int) -> int:
        return _REFUSED if "push" in self.refuse else 0

    def pop_context(self, _popped: int) -> int:
        return 0

    def memcpy_batch(
        self, to: int, source: int, length: int, count: int, _how: int, _first: int, _n: int, stream: int
    ) -> int:
        if "copy" in self.refuse:
            return _REFUSED
        self.copies.append((count, stream))
        every = list(zip(*(_words(address, count) for address in (to, source, length)), strict=True))
        self._do(stream, lambda: [ctypes.memmove(*span) for span in every] and None)
        return 0

    def memcpy_to_device(self, to: int, source: int, length: int, stream: int) -> int:
        self._do(stream, lambda: ctypes.memmove(to, source, length) and None)
        return 0

    def launch_kernel(self, _kernel: int, blocks: int, _y: int, _z: int, threads: int, *rest: int) -> int:
        stream, arguments = rest[3:5]
        if "gather" in self.refuse:
            return _REFUSED
        table, num_long, count = (
            kind.from_address(address).value
            for kind, address in zip((ctypes.c_uint64, ctypes.c_uint, ctypes.c_uint), _words(arguments, 3), strict=True)
        )
        self.gathers.append((count, num_long, blocks, stream))
        self._do(stream, lambda: gather_on_host()(table, num_long, count, blocks, threads))
        return 0

    def record_event(self, event: int, stream: int) -> int:
        if "mark" in self.refuse:
            return _REFUSED
        happened = self._event(event)
        happened.clear()
        self._do(stream, happened.set)
        return 0

    def query_event(self, event: int) -> int:
        return 0 if self._event(event).is_set() else _NOT_READY

    def wait_for_event(self, event: int) -> int:
        self._event(event).wait()
        return _REFUSED if "wait" in self.refuse else 0

    def close(self) -> None:
        assert not self.mapped, "a mapping is left"
        assert not self._handles, "a stream or an event is left"


def make(argument: str) -> NvlinkTransport:
    """Factory for the conformance kit; "gather": a driver that copies no batches."""
    return NvlinkTransport(blocks=3, gpu_of=lambda _address: HostGpu(argument != "gather"))
