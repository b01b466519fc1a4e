"""``Gpu`` by NVIDIA's driver, through cuda-bindings; loaded when the first GPU is opened, not when this is imported."""

import ctypes
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array
from pdkv.transport.gpu import DriverCalls, Exported, SpanTable

HOW_TO_INSTALL = "pip install 'pdkv[nvlink]' brings cuda-bindings; torch built for CUDA 12.8 or later does too"

_THREADS = 512
"""Of a block of the gather kernel: sixteen warps, each with a span of its own."""

_HANDLE_BYTES = 64

_FORMS = 12000
"""The CUDA whose forms of functions native/nvlink_posting.c calls."""

_BATCHES_SINCE = 12080
_BATCHES_TELL_NO_INDEX_SINCE = 13000


_BESIDE_KERNELS = 1


class CudaTable:
    """Page-locked host memory and as much on the GPU, for ``capacity`` spans of three numbers."""

    def __init__(self, capacity: int, host: int, device: int) -> None:
        self.capacity = capacity
        self.host = host
        self.device = device
        self.numbers: Int64Array = np.ctypeslib.as_array((ctypes.c_int64 * (3 * capacity)).from_address(host))


class CudaGpu:
    """See ``Gpu``. Uses the device's primary context, as torch does, and leaves the caller's current context as it was.

    ``close`` gives the context back; whatever was mapped or made through it must have been dropped before.
    """

    def __init__(self, ordinal: int) -> None:
        """``ordinal``: as CUDA counts in this process. Raises ``TransportError`` without driver, GPU, cuda-bindings."""
        self._cuda = _driver()
        self._device = self._told(self._cuda.cuDeviceGet(ordinal))
        self.uuid = self._told(self._cuda.cuDeviceGetUuid(self._device)).bytes.hex()
        self._context = self._told(self._cuda.cuDevicePrimaryCtxRetain(self._device))
        self._kernel: Any = None
        self._closed = False
        try:
            self._copy_batch, self._tells_index = self._find_batches()
        except TransportError:
            self.close()
            raise
        self.can_copy_batches = self._copy_batch != 0

    @classmethod
    def of(cls, address: int) -> "CudaGpu":
        """The GPU whose memory is there."""
        return cls(_ordinal(_driver(), address))

    # ---- memory ----

    def holds(self, address: int, length: int) -> bool:
        if _ordinal(self._cuda, address) != int(self._device):
            return False
        with self._current():
            base, size = self._told(self._cuda.cuMemGetAddressRange(address))
        return address + length <= int(base) + int(size)

    def export(self, address: int) -> Exported:
        with self._current():
            base, _ = self._told(self._cuda.cuMemGetAddressRange(address))
            handle = self._told(self._cuda.cuIpcGetMemHandle(base))
        return Exported(ctypes.string_at(handle.getPtr(), _HANDLE_BYTES), address - int(base))

    def refusal(self, uuid: str) -> str:
        for ordinal in range(int(self._told(self._cuda.cuDeviceGetCount()))):
            other = self._told(self._cuda.cuDeviceGet(ordinal))
            if self._told(self._cuda.cuDeviceGetUuid(other)).bytes.hex() != uuid or int(other) == int(self._device):
                continue
            if not self._told(self._cuda.cuDeviceCanAccessPeer(self._device, other)):
                return f"GPU {self._device} has no peer access to GPU {ordinal}, where the peer's memory is"
        return ""

    def map(self, handle: bytes) -> int:
        if len(handle) != _HANDLE_BYTES:
            raise TransportError(f"a handle of {len(handle)} bytes is none of CUDA's")
        opened = self._cuda.CUipcMemHandle()
        ctypes.memmove(opened.getPtr(), handle, _HANDLE_BYTES)  # its field is not called the same in all versions
        flags = self._cuda.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS.value
        with self._current():  # the reading GPU: the mapping is for it
            return int(self._told(self._cuda.cuIpcOpenMemHandle(opened, flags)))

    def unmap(self, address: int) -> None:
        with self._current():
            self._told(self._cuda.cuIpcCloseMemHandle(address))

    # ---- work ----

    def make_stream(self) -> int:
        with self._current():
            return int(self._told(self._cuda.cuStreamCreate(self._cuda.CUstream_flags.CU_STREAM_NON_BLOCKING.value)))

    def drop_stream(self, stream: int) -> None:
        with self._current():
            self._told(self._cuda.cuStreamDestroy(stream))

    def make_table(self, capacity: int) -> CudaTable:
        size = 24 * capacity
        with self._current():
            host = int(self._told(self._cuda.cuMemHostAlloc(size, 0)))
            try:
                return CudaTable(capacity, host, int(self._told(self._cuda.cuMemAlloc(size))))
            except TransportError:
                self._cuda.cuMemFreeHost(host)
                raise

    def drop_table(self, table: SpanTable) -> None:
        assert isinstance(table, CudaTable)
        with self._current():
            self._told(self._cuda.cuMemFree(table.device))
            self._told(self._cuda.cuMemFreeHost(table.host))

    def make_event(self) -> int:
        flags = self._cuda.CUevent_flags
        with self._current():
            return int(
                self._told(
                    self._cuda.cuEventCreate(
                        flags.CU_EVENT_BLOCKING_SYNC.value | flags.CU_EVENT_DISABLE_TIMING.value
                    )  # sleeps, and does not spin
                )
            )

    def drop_event(self, event: int) -> None:
        with self._current():
            self._told(self._cuda.cuEventDestroy(event))

    def calls(self) -> DriverCalls:
        with self._current():
            if self._kernel is None:
                self._kernel = self._load_kernel()
        functions = {
            field: _address(self._cuda, name, since) or 0
            for field, name, since in (
                ("push_context", "cuCtxPushCurrent", _FORMS),
                ("pop_context", "cuCtxPopCurrent", _FORMS),
                ("memcpy_to_device", "cuMemcpyHtoDAsync", _FORMS),
                ("launch_kernel", "cuLaunchKernel", _FORMS),
                ("record_event", "cuEventRecord", _FORMS),
                ("query_event", "cuEventQuery", _FORMS),
                ("wait_for_event", "cuEventSynchronize", _FORMS),
            )
        }
        if missing := [field for field, address in functions.items() if not address]:
            raise TransportError(f"this NVIDIA driver lacks what reads need: {missing[0]}")
        return DriverCalls(
            **functions,
            memcpy_batch=self._copy_batch,
            context=int(self._context),
            kernel=int(self._kernel),
            threads=_THREADS,
            copy_flags=_BESIDE_KERNELS,
            tells_failed_index=self._tells_index,
        )

    def why(self, code: int, call: str) -> str:
        try:
            self._told((self._cuda.CUresult(code),), call)
        except (TransportError, ValueError) as error:  # a result that cuda-bindings does not know
            return str(error)
        return f"{call} failed, and says that it did not"

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._cuda.cuDevicePrimaryCtxRelease(self._device)

    # ---- the inside ----

    @contextmanager
    def _current(self) -> Iterator[None]:
        """This GPU's context for a few calls; the thread's own comes back afterwards."""
        self._told(self._cuda.cuCtxPushCurrent(self._context))
        try:
            yield
        finally:
            self._cuda.cuCtxPopCurrent()

    def _told(self, answer: tuple[Any, ...], call: str = "") -> Any:
        return _told(self._cuda, answer, call)

    def _find_batches(self) -> tuple[int, bool]:
        """The driver's copy of many spans in one call, which takes our arrays as they are: cuda-bindings would make an
        object of every number. And whether it has the older form with one argument more."""
        version = int(self._told(self._cuda.cuDriverGetVersion()))
        if version < _BATCHES_SINCE:
            return 0, False
        tells_index = version < _BATCHES_TELL_NO_INDEX_SINCE
        form = _BATCHES_SINCE if tells_index else _BATCHES_TELL_NO_INDEX_SINCE
        return _address(self._cuda, "cuMemcpyBatchAsync", form), tells_index

    def _load_kernel(self) -> Any:
        attributes = self._cuda.CUdevice_attribute
        major, minor = (
            int(self._told(self._cuda.cuDeviceGetAttribute(what, self._device)))
            for what in (
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                attributes.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
        # The context keeps the module, and ends with it; a hundred transports share a few KB each.
        module = self._told(self._cuda.cuModuleLoadData(compile_kernel(f"sm_{major}{minor}")))
        return self._told(self._cuda.cuModuleGetFunction(module, b"gather_spans"))


def kernel_source() -> str:
    """CUDA C++ of the gather kernel."""
    return files("pdkv.transport").joinpath("native/gather_spans.cu").read_text(encoding="utf-8")


@cache
def compile_kernel(architecture: str) -> bytes:
    """The gather kernel as machine code of one GPU architecture ("sm_90"). Needs NVRTC, and neither GPU nor driver.
    Raises ``TransportError`` with the compiler's words."""
    nvrtc = _bindings("nvrtc")
    try:
        error, program = nvrtc.nvrtcCreateProgram(kernel_source().encode(), b"gather_spans.cu", 0, [], [])
    except RuntimeError as missing:
        raise TransportError(f"CUDA's run-time compiler cannot be loaded ({missing}); {HOW_TO_INSTALL}") from missing
    if int(error):
        raise TransportError(f"NVRTC makes no program: {error.name}")
    try:
        options = [f"--gpu-architecture={architecture}".encode()]
        if int(nvrtc.nvrtcCompileProgram(program, len(options), options)[0]):
            log = b" " * nvrtc.nvrtcGetProgramLogSize(program)[1]
            nvrtc.nvrtcGetProgramLog(program, log)
            raise TransportError(f"NVRTC cannot build the gather kernel for {architecture}: {log.decode().strip()}")
        code: bytes = b" " * nvrtc.nvrtcGetCUBINSize(program)[1]
        nvrtc.nvrtcGetCUBIN(program, code)
        return code
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _bindings(module: str) -> Any:
    try:
        return importlib.import_module(f"cuda.bindings.{module}")
    except ImportError as error:
        raise TransportError(f"reading GPU memory needs cuda-bindings ({error}): {HOW_TO_INSTALL}") from error


def _driver() -> Any:
    cuda = _bindings("driver")
    try:
        _told(cuda, cuda.cuInit(0))
    except RuntimeError as missing:
        raise TransportError(f"there is no NVIDIA driver here: {missing}") from missing
    return cuda


def _address(cuda: Any, name: str, since: int) -> int:
    """Where a function of the driver is, in the form that CUDA ``since`` knows; 0 where it does not."""
    error, address, _ = cuda.cuGetProcAddress(name.encode(), since, 0)
    return int(address) if not int(error) and address else 0


def _ordinal(cuda: Any, address: int) -> int:
    """Which GPU holds the address. Asked directly: cuda-bindings 13.3 answers 0 for memory of every GPU."""
    attribute = cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
    ordinal = ctypes.c_int(-1)
    ask = ctypes.CFUNCTYPE(ctypes.c_int)(_address(cuda, "cuPointerGetAttribute", 4000))
    code = ask(ctypes.byref(ordinal), ctypes.c_int(int(attribute)), ctypes.c_uint64(address))
    _told(cuda, (cuda.CUresult(code),), "cuPointerGetAttribute")
    return ordinal.value


def _told(cuda: Any, answer: tuple[Any, ...], call: str = "") -> Any:
    """What a call of cuda-bindings returned behind its result code. Raises ``TransportError`` for a bad one."""
    error, *values = answer
    if int(error):
        _, text = cuda.cuGetErrorString(error)
        said = text.decode() if isinstance(text, bytes) else ""
        raise TransportError(f"CUDA refuses{f' {call}' if call else ''}: {cuda.CUresult(error).name} ({said})")
    return None if not values else values[0] if len(values) == 1 else tuple(values)
