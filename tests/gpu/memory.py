"""Memory of a GPU as the conformance kit wants it, by the driver alone: far ends start faster without torch."""

import weakref
from functools import cache
from typing import Any

import numpy as np

from pdkv.schema import LocalMemory
from pdkv.transport.conformance_target import Bytes


@cache
def _context(gpu: int) -> Any:
    from cuda.bindings import driver as cuda

    told(cuda.cuInit(0))
    return told(cuda.cuDevicePrimaryCtxRetain(told(cuda.cuDeviceGet(gpu))))


def driver(gpu: int = 0) -> Any:
    """cuda-bindings' driver module, with that GPU's primary context current in this thread."""
    from cuda.bindings import driver as cuda

    context = _context(gpu)
    told(cuda.cuCtxSetCurrent(context))
    return cuda


def told(answer: tuple[Any, ...]) -> Any:
    error, *values = answer
    assert int(error) == 0, error
    return values[0] if len(values) == 1 else tuple(values)


GIB = 1 << 30


def free_bytes() -> int:
    """Of the first GPU."""
    return int(told(driver().cuMemGetInfo())[0])


class GpuMemory:
    """See ``KitMemory``: one allocation on a GPU, the first if none is named, and what it holds as a copy."""

    def __init__(self, size: int, gpu: int = 0) -> None:
        self._gpu = gpu
        address = int(told(driver(gpu).cuMemAlloc(size)))
        self.memory = LocalMemory(address, size, f"cuda:{gpu}")
        weakref.finalize(self, driver(gpu).cuMemFree, address)

    @property
    def bytes(self) -> Bytes:
        return self.look(0, self.memory.length)

    def look(self, start: int, length: int) -> Bytes:
        copy = np.empty(length, dtype=np.uint8)
        told(driver(self._gpu).cuMemcpyDtoH(copy.ctypes.data, self.memory.address + start, length))
        return copy

    def fill(self, values: Bytes | int) -> None:
        if isinstance(values, int):
            told(driver(self._gpu).cuMemsetD8(self.memory.address, values, self.memory.length))
        else:
            values = np.ascontiguousarray(values)
            told(driver(self._gpu).cuMemcpyHtoD(self.memory.address, values.ctypes.data, values.size))
        told(driver(self._gpu).cuCtxSynchronize())


def make_huge(_size: int) -> GpuMemory:
    """What stands for an arena, whatever the kit asks for."""
    return GpuMemory(4 * GIB)
