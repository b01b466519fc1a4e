"""One-sided reads over UCX: RDMA, TCP or shared memory, whichever UCX finds between two workers."""

import logging
import os
import re

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.process_life import Life, ProcessHome
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.ucx_library import HOW_TO_INSTALL, UcxLibrary, find_ucx_library
from pdkv.transport.ucx_start import started

try:
    from pdkv.transport._ucp import ENDED, UNWATCHED, Engine

    _BINDING_ERROR: ImportError | None = None
except ImportError as missing:
    _BINDING_ERROR = missing

log = logging.getLogger("pdkv.transport.ucx")

_STATUS = (ReadStatus.OK, ReadStatus.FAILED, ReadStatus.CANCELLED)
"""By the native engine's numbers."""

_MAGIC = b"pdkvucx2"

_EMULATED = "software emulation"
"""How UCX calls reads that the peer's processor answers."""

_PATHS = (
    ("tcp", re.compile(r"\btcp\b")),
    ("shm", re.compile(r"\b(posix|sysv|cma|knem|xpmem|self)\b")),
    ("rdma", re.compile(r"\b(rc|dc|ud|gga|srd)(_\w+)?\b|\bib\b")),
    ("cuda_ipc", re.compile(r"\bcuda_ipc\b")),
)
"""UCX transports by path, the least wanted first: a read that travels two ways is called after the worse."""


_SAID = re.compile(r"length \d+ (.*?)(?: [\d.]+ MB/s.*)?$")
"""What matters of, for example, "{...} get into host memory length 4096 zero-copy rc_mlx5/mlx5_0:1 23456.0 MB/s"."""


def _may_pass(error: Exception) -> bool:
    """Whether UCX failed at the machine's interfaces, which may be others soon."""
    return isinstance(error, OSError) and "ucp_worker_create" in str(error)


class UcxOptions(msgspec.Struct, frozen=True):
    """How a ``UcxTransport`` is set up. The defaults suit every worker; tests force paths with ``tls``."""

    library: str | None = None
    """A libucp file, or the directory that holds it; None looks for one (``ucx_library``)."""
    cuda: bool = False
    """It is to carry the memory of NVIDIA GPUs."""
    tls: str | None = None
    """UCX transports to use, as in UCX_TLS. None = all but cma (2-5 x slower than posix) and sysv (same as posix)."""
    net_devices: str | None = None
    """Network devices to use, as in UCX_NET_DEVICES; None = all."""
    keepalive_ms: int = 500
    """How often UCX looks whether a silent peer still lives. A process that can be seen from here is watched by its
    pidfd besides, which tells of its death at once."""
    window_spans: int = 16
    """Most spans of one peer in flight."""
    window_bytes: int = 4 << 20
    """Most bytes of one peer in flight, one span aside. More than any link's bandwidth x delay gains nothing, and each
    emulated read in flight raises the odds that a reader's sudden death makes UCX abort its target."""
    linger_us: int = 50
    """How long the progress thread goes on looking after the last event before it sleeps."""
    drain_ms: int = 200
    """How long a close lets reads in flight arrive before it uses force; UCX can abort a *target* whose reader leaves
    amid an emulated read. Only a peer that hangs makes a close take that long, and ``close_peer`` never blocks."""


class UcxSetting(msgspec.Struct, frozen=True):
    """One UCX setting that we need, and what became of it."""

    name: str
    """As UCX's environment variables are called: "UCX_..."."""
    value: str
    inherited: bool
    """The environment sets it to ``value``, and that wins over ours."""
    ours: str


class _Worker(msgspec.Struct, frozen=True, array_like=True):
    address: bytes
    on_gpu: bool
    home: ProcessHome | None = None
    """None from peers of versions before it was told."""


class UcxTransport(Transport):
    """See ``Transport``. A native thread of its own does all of UCX's work, without the GIL, and sleeps when idle; as
    the target of reads it needs nothing of the owner. Not for use after a fork (spawn instead).

    A read completes OK only if its peer's process lived when the bytes had come, as far as that can be seen: UCX maps
    GPU memory (cuda_ipc), and a mapping outlives its maker. A peer whose memory it maps and whose process cannot be
    watched from here, being in another process namespace, is not read at all.

    ``library`` and ``settings`` say what was loaded and set; both are logged.
    """

    name = "ucx"

    def __init__(self, options: UcxOptions | None = None) -> None:
        """Raises ``TransportError`` when the binding or libucp is missing, or UCX cannot start."""
        options = options or UcxOptions()
        if _BINDING_ERROR is not None:
            raise TransportError(
                f"the UCX binding is not built ({_BINDING_ERROR}): install pdkv with pip, "
                "or run `python setup.py build_ext --inplace` in a checkout"
            ) from _BINDING_ERROR
        if options.window_spans < 1 or options.window_bytes < 1:
            raise TransportError("UcxOptions: window_spans and window_bytes must be at least 1")
        self.settings = ucx_settings(options, dict(os.environ))
        chosen = find_ucx_library(options.library, cuda=options.cuda)
        ours = [(s.name.removeprefix("UCX_").encode(), s.value.encode()) for s in self.settings if not s.inherited]
        limits = (options.window_spans, options.window_bytes, options.linger_us, options.drain_ms)
        try:
            self._engine = started(lambda: Engine(os.fsencode(chosen.path), ours, *limits), _may_pass)
        except OSError as error:
            raise TransportError(f"UCX ({chosen.path}) cannot start: {error}; {HOW_TO_INSTALL}") from error
        self.library: UcxLibrary = msgspec.structs.replace(chosen, version=self._engine.version)
        self._memories: list[MemoryDescriptor] = []
        self._on_gpu = False
        self._gpu_peers: set[PeerId] = set()
        self._unjudged: set[PeerId] = set()
        """GPU peers of which no read has shown yet how UCX carries them."""
        self._fileno = self._engine.fileno()
        self._home = ProcessHome.of(os.getpid())
        self._closed = False
        self._log_start()

    def _log_start(self) -> None:
        kind = "with" if self.library.has_infiniband else "without"
        log.info(f"UCX {self.library.version} ({self.library.source}, {kind} InfiniBand): {self.library.path}")
        for setting in self.settings:
            if setting.inherited and setting.value != setting.ours:
                log.warning(f"{setting.name}={setting.value} is inherited and wins over pdkv's {setting.ours}")
        for refused in self._engine.refused:
            log.warning(f"this UCX refuses the setting UCX_{refused.decode()}")

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        if memory.address <= 0 or memory.length <= 0:
            raise TransportError(f"cannot register {memory.length} bytes at {memory.address:#x}")
        if memory.device != "cpu" and not self.library.has_cuda:
            raise TransportError(
                f"UCX {self.library.version} ({self.library.path}) has no CUDA and cannot register {memory.length} "
                f"bytes on {memory.device}; install libucx-cu12 or libucx-cu13, or name another with --ucx-library"
            )
        try:
            key = self._engine.register(memory.address, memory.length, memory.device == "cpu")
        except OSError as error:
            raise TransportError(
                f"UCX cannot register {memory.length} bytes at {memory.address:#x} on {memory.device}: {error}"
            ) from error
        descriptor = MemoryDescriptor(address=memory.address, length=memory.length, key=seal(_MAGIC, key))
        self._memories.append(descriptor)
        self._on_gpu = self._on_gpu or memory.device != "cpu"
        return descriptor

    def address(self) -> TransportAddress:
        worker = msgspec.msgpack.encode(_Worker(self._engine.address(), self._on_gpu, self._home))
        return TransportAddress(transport=self.name, address=seal(_MAGIC, worker), memories=tuple(self._memories))

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        if address.transport != self.name:
            raise TransportError(f"a ucx transport cannot reach a {address.transport!r} address")
        try:
            worker = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=_Worker)
        except msgspec.MsgspecError as error:
            raise TransportError(f"the peer's UCX address says nothing that this version knows: {error}") from error
        memories = [
            (memory.address, memory.length, unseal(_MAGIC, memory.key, f"the key of the peer's memory {index}"))
            for index, memory in enumerate(address.memories)
        ]
        if any(base < 0 or length < 0 or base + length >= 1 << 64 for base, length, _ in memories):
            raise TransportError("the peer describes memory outside its address space")
        peer = PeerId(self._connect(worker, memories))
        if worker.on_gpu or self._on_gpu:
            self._gpu_peers.add(peer)
            self._unjudged.add(peer)
        return peer

    def _connect(self, worker: _Worker, memories: list[tuple[int, int, bytes]]) -> int:
        life_fd = self._watch(worker.home)
        try:
            return self._engine.connect(worker.address, memories, life_fd)
        except MemoryError:
            if life_fd >= 0:
                os.close(life_fd)
            raise

    def _watch(self, home: ProcessHome | None) -> int:
        """A pidfd for the engine, or what stands for none."""
        if home is None or not home.is_visible_from(self._home):
            return UNWATCHED
        try:
            life = Life(home)
        except TransportError as error:
            log.info(f"{error}; its death is seen by UCX's keepalive")
            return UNWATCHED
        return ENDED if life.fd < 0 else life.give_away()

    def close_peer(self, peer: PeerId) -> None:
        self._unjudged.discard(peer)
        if not self._closed:
            self._engine.close_peer(peer)

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        arrays = [_int64(array) for array in (batch.memory, batch.remote, batch.local, batch.length)]
        try:
            return ReadId(self._engine.submit(peer, *arrays))
        except ValueError as error:
            raise TransportError(f"a batch that is none: {error}") from error

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        done = [Completion(ReadId(read), _STATUS[status], error) for read, status, error in self._engine.poll()]
        if done and self._unjudged:
            self._judge()
        return done

    def _judge(self) -> None:
        """Say so where GPU memory crawls."""
        for peer in [peer for peer in self._unjudged if self.note(peer)]:
            self._unjudged.remove(peer)
            if self.crawls(peer):
                log.warning(
                    f"UCX copies GPU memory of peer {peer} piece by piece, at 2 GB/s or less: {self.note(peer)}"
                )

    def fileno(self) -> int:
        return self._fileno

    def path(self, peer: PeerId) -> str:
        return "unknown" if self._closed else path_of(self._engine.path(peer))

    def note(self, peer: PeerId) -> str:
        """What UCX calls the way of the longest read, and the devices that it spreads long ones over."""
        if self._closed:
            return ""
        said, lanes = _SAID.search(self._engine.path(peer)), self._engine.lanes(peer)
        return f"UCX: {said[1]}, lanes {lanes}" if said else ""

    def crawls(self, peer: PeerId) -> bool:
        """GPU memory that the peer's processor sends: UCX copies it up and down piece by piece, at less than 1 GB/s."""
        return not self._closed and peer in self._gpu_peers and _EMULATED in self._engine.path(peer)

    def close(self) -> None:
        self._closed = True
        self._engine.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the ucx transport is closed")


def ucx_settings(options: UcxOptions, environ: dict[str, str]) -> tuple[UcxSetting, ...]:
    """What UCX is told, and where ``environ`` (which UCX itself reads) has the last word."""
    ours = {
        "UCX_TLS": options.tls or "^cma,sysv",
        "UCX_KEEPALIVE_INTERVAL": f"{options.keepalive_ms}ms",
        # Without it posix and sysv refuse endpoints that report a peer's death.
        "UCX_MM_ERROR_HANDLING": "y",
        # Packets of the copies that stand in for remote reads; the element's 16-bit length allows no more than 65,535.
        "UCX_MM_SEG_SIZE": "32K",
        "UCX_TCP_TX_SEG_SIZE": "1M",
        "UCX_TCP_RX_SEG_SIZE": "1M",
        # Every buffer is registered once, by hand: no cache, and so no hooks in the process's mmap and munmap.
        "UCX_RCACHE_ENABLE": "n",
        # UCX logs to standard output, and calls a peer's death an error of its own; ours is a completion.
        "UCX_LOG_LEVEL": "fatal",
    }
    if options.cuda:
        # UCX does not read by mapping where it sees no NVLink, but every other way of its is slower.
        ours["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] = "on"
    if options.net_devices is not None:
        ours["UCX_NET_DEVICES"] = options.net_devices
    return tuple(
        UcxSetting(name=name, value=environ.get(name, value), inherited=name in environ, ours=value)
        for name, value in ours.items()
    )


def path_of(info: str) -> str:
    """The path named by UCX's description of a request, such as "software emulation tcp/lo"; "unknown" if none is."""
    for path, pattern in _PATHS:
        if pattern.search(info):
            return path
    return "unknown"


def _int64(array: Int64Array) -> Int64Array:
    return np.ascontiguousarray(array, dtype=np.int64)
