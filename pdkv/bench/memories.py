"""The memories that bytes move between: a memfd that all processes map, or a GPU's memory, which one process owns.

Needs nothing but numpy, msgspec and, for GPUs, NVIDIA's driver.
"""

import ctypes
import mmap
from functools import cache

import msgspec
import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]


class DriverError(Exception):
    """NVIDIA's driver is missing, or refused a call; the message says which."""


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """One side's memory, as addressed in this process. Stays until the process ends."""

    address: int
    num_bytes: int
    device: str = "cpu"
    """Or "cuda:N", N as this process counts its GPUs."""
    fd: int = -1
    """The memfd that is mapped whole; -1 on a GPU."""

    @property
    def gpu(self) -> int:
        """Number of the GPU, or -1."""
        return -1 if self.device == "cpu" else int(self.device.partition(":")[2])


class HostMemory(Memory, frozen=True, kw_only=True):
    bytes: Bytes  # [num_bytes]


class HostPlace(msgspec.Struct, frozen=True, tag="host"):
    """A memfd, inherited by whoever is told of it."""

    fd: int
    num_bytes: int


class GpuPlace(msgspec.Struct, frozen=True, tag="gpu"):
    """A GPU on which whoever is told of it allocates."""

    gpu: int
    num_bytes: int


Place = HostPlace | GpuPlace


def take(place: Place) -> Memory:
    """Map what the place names, or allocate there. Raises ``DriverError``."""
    return map_memory(place.fd, place.num_bytes) if isinstance(place, HostPlace) else allocate(place)


def map_memory(fd: int, num_bytes: int) -> HostMemory:
    return host_memory(np.frombuffer(mmap.mmap(fd, num_bytes), dtype=np.uint8), fd)


def host_memory(array: Bytes, fd: int = -1) -> HostMemory:
    """An array, which must outlive what is returned, as a memory."""
    return HostMemory(address=int(array.ctypes.data), num_bytes=array.size, fd=fd, bytes=array)


def handle_of(memory: Memory) -> bytes:
    """By which another process can open a GPU's memory (``open_handle``); empty for host memory."""
    if memory.gpu < 0:
        return b""
    handle = _IpcHandle()
    make_current(memory.gpu)
    driver().call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_void_p(memory.address))
    return bytes(handle)


def open_handle(handle: bytes, gpu: int, num_bytes: int) -> Memory:
    """Another process's allocation on GPU ``gpu``, seen from that GPU."""
    make_current(gpu)
    address = ctypes.c_void_p()
    driver().call("cuIpcOpenMemHandle_v2", ctypes.byref(address), _IpcHandle.from_buffer_copy(handle), 1)
    return Memory(address=address.value or 0, num_bytes=num_bytes, device=f"cuda:{gpu}")


def close_handle(memory: Memory) -> None:
    """Of a memory from ``open_handle``."""
    make_current(memory.gpu)
    driver().call("cuIpcCloseMemHandle", ctypes.c_void_p(memory.address))


def allocate(place: GpuPlace) -> Memory:
    """An allocation of its own, with the GPU's primary context (torch's too) current in the calling thread."""
    make_current(place.gpu)
    address = ctypes.c_void_p()
    driver().call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(place.num_bytes))
    return Memory(address=address.value or 0, num_bytes=place.num_bytes, device=f"cuda:{place.gpu}")


class _IpcHandle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * 64),)


class Driver:
    """NVIDIA's driver library. Calls that fail raise ``DriverError`` with the driver's own word for why."""

    def __init__(self) -> None:
        try:
            self._library = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise DriverError(f"there is no NVIDIA driver ({error})") from error
        self.call("cuInit", 0)

    def call(self, name: str, *arguments: object) -> None:
        function = getattr(self._library, name)
        if code := function(*arguments):
            said = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(said))
            raise DriverError(f"{name}: {(said.value or b'unknown').decode()} ({code})")


@cache
def driver() -> Driver:
    return Driver()


@cache
def _context(gpu: int) -> ctypes.c_void_p:
    device, context = ctypes.c_int(), ctypes.c_void_p()
    driver().call("cuDeviceGet", ctypes.byref(device), gpu)
    driver().call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
    return context


def make_current(gpu: int) -> None:
    """Make a GPU's primary context that of the calling thread."""
    driver().call("cuCtxSetCurrent", _context(gpu))


def gpu_names() -> tuple[str, ...]:
    """Of all GPUs that this process can use; none where there is no driver."""
    count = ctypes.c_int()
    try:
        driver().call("cuDeviceGetCount", ctypes.byref(count))
    except DriverError:
        return ()
    names = []
    for gpu in range(count.value):
        device, name = ctypes.c_int(), ctypes.create_string_buffer(128)
        driver().call("cuDeviceGet", ctypes.byref(device), gpu)
        driver().call("cuDeviceGetName", name, len(name), device)
        names.append(name.value.decode())
    return tuple(names)


class PeerCopier:
    """Copies between two GPUs' memories of this process on one stream. Owned by the calling thread."""

    def __init__(self, to: Memory, source: Memory) -> None:
        self._to, self._source = to, source
        make_current(to.gpu)
        if to.gpu != source.gpu:
            driver().call("cuCtxEnablePeerAccess", _context(source.gpu), 0)
        self._stream = ctypes.c_void_p()
        driver().call("cuStreamCreate", ctypes.byref(self._stream), 1)  # CU_STREAM_NON_BLOCKING

    def post(self, remote: int, local: int, length: int) -> None:
        to, source = (ctypes.c_void_p(m.address + at) for m, at in ((self._to, local), (self._source, remote)))
        driver().call("cuMemcpyAsync", to, source, ctypes.c_size_t(length), self._stream)

    def wait(self) -> None:
        driver().call("cuStreamSynchronize", self._stream)
