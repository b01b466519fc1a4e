"""Memory for the conformance kit that processors cannot touch: a GPU's, and one that stands in for it without a GPU."""

import ctypes
import mmap
import os
import weakref
from functools import cache

import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory
from pdkv.transport.conformance_target import Bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_NO_ACCESS = 0
_MAP_FAILED = ctypes.c_void_p(-1).value


class HiddenArray:
    """Bytes at an address that faults whoever touches it, as a GPU's memory does; checks see them by another mapping.

    Transports know it by its device, "emulated", and copy it through the memfd.
    """

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("pdkv-hidden", os.MFD_CLOEXEC)
        os.ftruncate(descriptor, size)
        address = _libc.mmap(None, size, _NO_ACCESS, mmap.MAP_SHARED, descriptor, 0)
        if address == _MAP_FAILED:
            os.close(descriptor)
            raise MemoryError(f"cannot map {size} bytes")
        weakref.finalize(self, _libc.munmap, address, size)
        weakref.finalize(self, os.close, descriptor)
        self.bytes: Bytes = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
        self.memory = LocalMemory(address=address, length=size, device="emulated", memfd=descriptor)

    def look(self, start: int, length: int) -> Bytes:
        return self.bytes[start : start + length]

    def fill(self, values: Bytes | int) -> None:
        self.bytes[:] = values


class CudaArray:
    """Bytes in an allocation of their own on the first GPU. Needs the driver, and no torch."""

    def __init__(self, size: int) -> None:
        self._driver = _driver()
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        self._address = address
        self.memory = LocalMemory(address=address.value, length=size, device="cuda:0")
        weakref.finalize(self, self._driver.cuMemFree_v2, address)

    @property
    def bytes(self) -> Bytes:
        return self.look(0, self.memory.length)

    def look(self, start: int, length: int) -> Bytes:
        copy = np.empty(length, dtype=np.uint8)
        source = ctypes.c_uint64(self.memory.address + start)
        self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(copy.ctypes.data), source, ctypes.c_size_t(length))
        return copy

    def fill(self, values: Bytes | int) -> None:
        whole = np.empty(self.memory.length, dtype=np.uint8)
        whole[:] = values
        self._call("cuMemcpyHtoD_v2", self._address, ctypes.c_void_p(whole.ctypes.data), ctypes.c_size_t(whole.size))
        self._call("cuCtxSynchronize")

    def _call(self, name: str, *arguments: object) -> None:
        error = getattr(self._driver, name)(*arguments)
        if error:
            raise TransportError(f"{name}: CUDA error {error}")


@cache
def _driver() -> ctypes.CDLL:
    """The driver, with the first GPU's primary context current in this thread."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportError(f"no CUDA driver: {error}") from error
    context = ctypes.c_void_p()
    for failed in (
        driver.cuInit(0),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0),
        driver.cuCtxSetCurrent(context),
    ):
        if failed:
            raise TransportError(f"the CUDA driver cannot start: error {failed}")
    return driver
