"""NIXL, where we meet it: which build is installed, an agent over its UCX backend, its errors as ours."""

import contextlib
import ctypes
import importlib
import importlib.metadata
import importlib.util
import logging
import os
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, LocalMemory
from pdkv.transport.ucx_start import started

BACKEND = "UCX"

HOW_TO_INSTALL = "pip install 'pdkv[nixl]', or nixl-cu13 where the driver has CUDA 13"

_LOG_LEVEL = "NIXL_LOG_LEVEL"
"""Read as NIXL loads. It calls a peer's death an error, on standard error; ours is a completion."""

_PROGRESS_US = 1000
"""NIXL's progress thread looks after its workers this often besides what wakes it; 0, its default, is a busy loop."""


class NixlPackage(msgspec.Struct, frozen=True):
    """A build of NIXL that has been loaded."""

    name: str
    """As it is installed: "nixl-cu12"."""
    version: str
    bindings: Any
    """Its compiled module. NIXL's Python class over it leaves no say in how often progress threads look."""
    errors: tuple[type[Exception], ...]
    """All that its calls raise."""


class NixlMemory(msgspec.Struct, frozen=True, array_like=True):
    """Where memory lies, as NIXL's lists name it."""

    on_gpu: bool
    device: int
    """Number of the GPU in its own process; 0 for host memory."""

    @staticmethod
    def of(memory: LocalMemory) -> "NixlMemory":
        """Raises ``TransportError`` for a device that NIXL has no name for."""
        if memory.device == "cpu":
            return NixlMemory(on_gpu=False, device=0)
        kind, _, number = memory.device.partition(":")
        if kind != "cuda" or not number.isdigit():
            raise TransportError(f"NIXL carries memory of hosts and of NVIDIA GPUs, not of {memory.device}")
        return NixlMemory(on_gpu=True, device=int(number))


def installed_nixl() -> str:
    """The build of NIXL that would be loaded, such as "nixl-cu12", without loading it; empty when there is none.

    Where both are, the driver decides: one for CUDA 13 can take both, an older one only that for CUDA 12.
    """
    found = [name for name in ("nixl_cu13", "nixl_cu12") if importlib.util.find_spec(name) is not None]
    if len(found) > 1 and _driver_cuda() < 13_000:
        found.reverse()
    return found[0].replace("_", "-") if found else ""


@cache
def load_nixl() -> NixlPackage:
    """Raises ``TransportError`` when NIXL is not installed, does not load, or lacks its UCX backend."""
    name = installed_nixl()
    if not name:
        raise TransportError(f"NIXL is not installed: {HOW_TO_INSTALL}")
    told = logging.raiseExceptions  # which NIXL turns off for the whole process
    quiet = _LOG_LEVEL not in os.environ
    try:
        if quiet:
            os.environ[_LOG_LEVEL] = "FATAL"
        bindings = importlib.import_module(f"{name.replace('-', '_')}._bindings")
    except ImportError as error:
        raise TransportError(f"{name} does not load: {error}; {HOW_TO_INSTALL}") from error
    finally:
        logging.raiseExceptions = told
        if quiet:
            os.environ.pop(_LOG_LEVEL, None)
    raised = [kind for kind in vars(bindings).values() if isinstance(kind, type) and issubclass(kind, Exception)]
    return NixlPackage(name, importlib.metadata.version(name), bindings, (*raised, RuntimeError, ValueError))


class NixlAgent:
    """One NIXL agent. Owned by one thread; its progress runs on a thread of NIXL's without the interpreter's lock.

    NIXL can stop nothing that is under way: a released transfer goes on writing, and so do those of a peer that is
    forgotten. Only the agent's end is one: what it was asked for has landed before ``close`` returns, or never does.

    Every call raises ``TransportError`` for what NIXL refuses.
    """

    def __init__(self, package: NixlPackage, name: str, settings: Mapping[str, str], gpu: int = -1) -> None:
        """``settings``: of its UCX, names without "UCX_"; the environment wins over them. ``gpu``: whose memory it is
        to carry, as this process counts; -1 = the host's."""
        self.name = name
        self._nixl = package
        if gpu >= 0:
            _take_context(gpu)  # UCX carries GPU memory only where it finds a context
        config = package.bindings.nixlAgentConfig()
        config.useProgThread = True
        config.useListenThread = False
        config.pthrDelay = _PROGRESS_US
        config.syncMode = package.bindings.NIXL_THREAD_SYNC_NONE
        told = ",".join(f"{key}={value}" for key, value in settings.items())

        def start() -> tuple[Any, int]:
            agent = package.bindings.nixlAgent(name, config)
            return agent, agent.createBackend(BACKEND, {"engine_config": told})

        with self._mapped("cannot start"):
            # NIXL does not tell why; UCX's log does.
            self._agent, self._backend = started(start, lambda error: isinstance(error, package.errors))

    def register(self, memory: LocalMemory) -> None:
        place = NixlMemory.of(memory)
        entry = [(memory.address, memory.length, place.device, "")]
        with self._mapped(f"cannot register {memory.length} bytes at {memory.address:#x} on {memory.device}"):
            self._agent.registerMem(self._nixl.bindings.nixlRegDList(self._kind(place.on_gpu), entry), [self._backend])

    def metadata(self) -> bytes:
        """What a peer's agent needs to read all that is registered."""
        with self._mapped("cannot say how to be reached"):
            told: bytes = self._agent.getLocalMD()
        return told

    def meet(self, metadata: bytes) -> str:
        """Take in a peer; returns its agent's name. It is connected to by the first read."""
        with self._mapped("cannot take the peer's metadata"):
            return str(self._agent.loadRemoteMD(metadata).decode())

    def post(self, peer: str, local: "NixlSide", remote: "NixlSide") -> tuple[int, bool]:
        """Start reading row by row; returns a handle for ``has_ended``, and whether it has ended already."""
        with self._mapped("cannot read the peer"):
            lists = [self._nixl.bindings.nixlXferDList(self._kind(side.on_gpu), side.table) for side in (local, remote)]
            read = self._nixl.bindings.NIXL_READ
            handle: int = self._agent.createXferReq(read, *lists, peer, "", [self._backend])
            status = self._agent.postXferReq(handle, "")
        return handle, status == self._nixl.bindings.NIXL_SUCCESS

    def has_ended(self, handle: int) -> bool:
        """Whether all bytes have landed; a transfer that ended badly is a ``TransportError``."""
        with self._mapped("lost the peer"):
            return bool(self._agent.getXferStatus(handle) == self._nixl.bindings.NIXL_SUCCESS)

    def release(self, handle: int) -> None:
        """Forget a transfer, which goes on if it has not ended."""
        with self._mapped("cannot release a transfer"):
            self._agent.releaseXferReq(handle)

    def close(self) -> None:
        """Idempotent. Its destructor ends the progress thread and UCX's worker, and all transfers with them."""
        self._agent = None

    def _kind(self, on_gpu: bool) -> Any:
        return self._nixl.bindings.VRAM_SEG if on_gpu else self._nixl.bindings.DRAM_SEG

    @contextlib.contextmanager
    def _mapped(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._nixl.errors as error:
            more = "" if _LOG_LEVEL in os.environ else f" ({_LOG_LEVEL}=INFO makes it say more)"
            raise TransportError(f"NIXL {self._nixl.version} {what}: {error}{more}") from error


class NixlSide(msgspec.Struct, frozen=True):
    """One side of a transfer: rows of address, bytes and device, int64[spans, 3] without gaps."""

    on_gpu: bool
    table: Int64Array


def _driver_cuda() -> int:
    """The CUDA version of NVIDIA's driver, such as 13000; 0 without one."""
    version = ctypes.c_int()
    try:
        ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return 0
    return version.value


def _take_context(gpu: int) -> None:
    """Make a GPU's primary context current in this thread. Raises ``TransportError``."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise TransportError(f"no CUDA driver: {error}") from error
    device, context = ctypes.c_int(), ctypes.c_void_p()
    for failed in (
        driver.cuInit(0),
        driver.cuDeviceGet(ctypes.byref(device), gpu),
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),
        driver.cuCtxSetCurrent(context),
    ):
        if failed:
            raise TransportError(f"the CUDA driver refuses GPU {gpu}: error {failed}")
