"""One-sided reads over NIXL and its UCX backend, for fleets that standardise on it."""

import logging
import os
import secrets

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.nixl_agent import NixlAgent, NixlMemory, NixlSide, load_nixl
from pdkv.transport.nixl_reader import CompletionBox, NixlFarEnd, NixlNearEnd, NixlRead, NixlReader
from pdkv.transport.process_life import Life, ProcessHome
from pdkv.transport.ranges import fault_of
from pdkv.transport.sealed import seal, unseal

log = logging.getLogger("pdkv.transport.nixl")

_MAGIC = b"pdkvnix1"

_JAMMING = frozenset({"posix", "sysv", "xpmem", "mm", "sm", "shm", "all"})
"""UCX's shared memory that the peer's processor serves, and names that include it."""

_EMULATED = "software emulation"
"""How UCX calls reads that the peer's processor answers."""


class NixlOptions(msgspec.Struct, frozen=True):
    """How a ``NixlTransport`` is set up. The defaults suit every worker; tests force paths with ``tls``."""

    tls: str | None = None
    """UCX transports to use, as in UCX_TLS but one word only: NIXL takes no commas here. None = all but posix, sysv and
    xpmem, which are refused: where a peer over them dies or is stopped, NIXL's progress thread can loop for ever, and
    the end of its agent wait for that, with the interpreter's lock held."""
    keepalive_ms: int = 500
    """How often UCX looks whether a silent peer on another host still lives. A process that can be seen from here is
    watched by its pidfd instead."""
    window_spans: int = 0
    """Most spans in one of NIXL's transfers, two of a peer being in flight. 0 = 96 of host memory, which are fewer
    than the messages that fit into a queue of UCX's shared memory; 1,024 of a GPU's."""
    window_bytes: int = 0
    """Most bytes in one of them, one span aside. 0 = 4 MiB of host memory, 256 MiB of a GPU's."""
    drain_ms: int = 200
    """How long a close lets reads in flight arrive. Only a peer that hangs makes it take that long."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    metadata: bytes
    """Of the agent that is read: its name, how to connect, and what it has registered."""
    home: ProcessHome


class _Peer(msgspec.Struct, frozen=True):
    memories: tuple[MemoryDescriptor, ...]
    bases: np.ndarray  # int64[memories]
    devices: np.ndarray  # int64[memories]
    on_gpu: bool
    reader: NixlReader


class NixlTransport(Transport):
    """See ``Transport``. One agent is read by peers; each peer is read by an agent of its own (``NixlReader``), with
    every memory registered, because only an agent's end stops what NIXL has under way. ``close_peer`` returns at once;
    completions follow when the agent is gone, at most ``drain_ms`` and a moment later.

    All memories are of the host, or all of one GPU. As the target of reads it needs nothing of the owner.
    """

    name = "nixl"

    def __init__(self, options: NixlOptions | None = None) -> None:
        """Raises ``TransportError`` when NIXL is missing."""
        self._options = options or NixlOptions()
        if self._options.tls is not None and "," in self._options.tls:
            raise TransportError(
                f"NIXL takes one UCX transport, not {self._options.tls!r}: set UCX_TLS in the environment for more"
            )
        if self._options.tls in _JAMMING:
            raise TransportError(
                f"NIXL over UCX's {self._options.tls} can hang for good when a peer dies; name another, or none"
            )
        inherited = os.environ.get("UCX_TLS", "")
        if not inherited.startswith("^") and _JAMMING & set(inherited.split(",")):
            log.warning(f"UCX_TLS={inherited} is inherited: over posix, sysv and xpmem NIXL can hang when a peer dies")
        if self._options.window_spans < 0 or self._options.window_bytes < 0:
            raise TransportError("NixlOptions: window_spans and window_bytes must not be negative")
        self.package = load_nixl()
        self._agent_name = f"pdkv-{secrets.token_hex(8)}"
        self._agent: NixlAgent | None = None
        """Made with the first memory, which says whether it carries a GPU's."""
        self._places: list[NixlMemory] = []
        self._memories: list[LocalMemory] = []
        self._descriptors: list[MemoryDescriptor] = []
        self._home = ProcessHome.of(os.getpid())
        self._box = CompletionBox()
        self._peers: dict[PeerId, _Peer] = {}
        self._leaving: list[NixlReader] = []
        """Of peers that have been closed."""
        self._next_peer = 0
        self._next_read = 0
        self._closed = False
        log.info(f"NIXL {self.package.version} ({self.package.name}) with its own UCX")

    # ---- this side ----

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        if memory.address <= 0 or memory.length <= 0:
            raise TransportError(f"cannot register {memory.length} bytes at {memory.address:#x}")
        place = NixlMemory.of(memory)
        if any(other != place for other in self._places):
            raise TransportError(f"a nixl transport carries memory of one place, not also of {memory.device}")
        agent = self._agent or self._open(place)
        agent.register(memory)
        key = seal(_MAGIC, msgspec.msgpack.encode(place))
        descriptor = MemoryDescriptor(address=memory.address, length=memory.length, key=key)
        self._places.append(place)
        self._memories.append(memory)
        self._descriptors.append(descriptor)
        return descriptor

    def _open(self, place: NixlMemory) -> NixlAgent:
        gpu = place.device if place.on_gpu else -1
        self._agent = NixlAgent(self.package, self._agent_name, self._settings(gpu), gpu)
        return self._agent

    def _settings(self, gpu: int) -> dict[str, str]:
        """Of NIXL's UCX, to carry memory of that GPU or, with -1, of the host. The environment wins over them."""
        settings = {
            # One that is read need not know who has died; and UCX aborts it if that shows amid an emulated read.
            "KEEPALIVE_INTERVAL": "inf",
            # Without it posix and sysv refuse endpoints that report a peer's death.
            "MM_ERROR_HANDLING": "y",
            # Every buffer is registered once, by hand: no cache, and so no hooks in the process's mmap and munmap.
            "RCACHE_ENABLE": "n",
            # UCX logs to standard output, and calls a peer's death an error of its own; ours is a completion.
            "LOG_LEVEL": "fatal",
        }
        if gpu >= 0:
            # UCX does not read by mapping where it sees no NVLink, but every other way of its is slower.
            settings["CUDA_IPC_ENABLE_GET_ZCOPY"] = "on"
        return settings | {"TLS": self._options.tls or "^mm"}

    def address(self) -> TransportAddress:
        self._check_open()
        agent = self._agent or self._open(NixlMemory(on_gpu=False, device=0))
        told = msgspec.msgpack.encode(_Address(agent.metadata(), self._home))
        return TransportAddress(self.name, seal(_MAGIC, told), tuple(self._descriptors))

    # ---- peers ----

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        if address.transport != self.name:
            raise TransportError(f"a nixl transport cannot reach a {address.transport!r} address")
        if any(m.address < 0 or m.length < 0 or m.address + m.length >= 1 << 63 for m in address.memories):
            raise TransportError("the peer describes memory outside its address space")
        try:
            far = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=_Address)
            places = [
                msgspec.msgpack.decode(unseal(_MAGIC, m.key, f"the key of the peer's memory {index}"), type=NixlMemory)
                for index, m in enumerate(address.memories)
            ]
        except msgspec.MsgspecError as error:
            raise TransportError(f"the peer's NIXL address says nothing that this version knows: {error}") from error
        if len({place.on_gpu for place in places}) > 1:
            raise TransportError("the peer's memory is partly its host's and partly its GPU's")
        number = PeerId(self._next_peer)
        self._next_peer += 1
        end = NixlFarEnd(far.metadata, self._watch(far.home))
        reader = NixlReader(f"{self._agent_name}-{number}", self._near_end(), end, self._box)
        self._peers[number] = _Peer(
            address.memories,
            np.array([m.address for m in address.memories], dtype=np.int64),
            np.array([place.device for place in places], dtype=np.int64),
            bool(places) and places[0].on_gpu,
            reader,
        )
        return number

    def _near_end(self) -> NixlNearEnd:
        here = self._places[0] if self._places else NixlMemory(on_gpu=False, device=0)
        gpu = here.device if here.on_gpu else -1
        spans, num_bytes = (1_024, 256 << 20) if here.on_gpu else (96, 4 << 20)
        return NixlNearEnd(
            package=self.package,
            memories=self._memories,
            gpu=gpu,
            settings=self._settings(gpu),
            keepalive_ms=self._options.keepalive_ms,
            window_spans=self._options.window_spans or spans,
            window_bytes=self._options.window_bytes or num_bytes,
            drain_s=self._options.drain_ms / 1000,
        )

    def _watch(self, home: ProcessHome) -> Life | None:
        if not home.is_visible_from(self._home):
            return None
        try:
            return Life(home)
        except TransportError as error:
            log.info(f"{error}; its death is seen by UCX's keepalive")
            return None

    def close_peer(self, peer: PeerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None:
            known.reader.close()
            self._leaving = [reader for reader in self._leaving if reader.is_alive]
            self._leaving.append(known.reader)

    def path(self, peer: PeerId) -> str:
        known = self._peers.get(peer)
        return known.reader.path if known is not None else "unknown"

    def note(self, peer: PeerId) -> str:
        known = self._peers.get(peer)
        return f"NIXL's UCX: {known.reader.words}" if known is not None and known.reader.words else ""

    def crawls(self, peer: PeerId) -> bool:
        """GPU memory that the peer's processor sends: UCX copies it up and down piece by piece."""
        known = self._peers.get(peer)
        if known is None:
            return False
        on_gpu = known.on_gpu or any(place.on_gpu for place in self._places)
        return on_gpu and _EMULATED in known.reader.words

    # ---- reads ----

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        if len({batch.memory.size, batch.remote.size, batch.local.size, batch.length.size}) != 1:
            raise TransportError("a batch that is none: its four arrays differ in length")
        number = ReadId(self._next_read)
        self._next_read += 1
        known = self._peers.get(peer)
        fault = f"peer {peer} is closed" if known is None else fault_of(batch, known.memories, self._memories)
        if known is None or fault:
            self._box.put(Completion(number, ReadStatus.FAILED, fault))
        else:
            known.reader.submit(self._read(number, batch, known))
        return number

    def _read(self, number: ReadId, batch: ReadBatch, peer: _Peer) -> NixlRead:
        """The batch in NIXL's terms, in arrays of its own. Its ranges are known to be good."""
        local = np.empty((batch.num_spans, 3), dtype=np.int64)
        remote = np.empty_like(local)
        local[:, 1] = remote[:, 1] = batch.length
        local[:, 0] = batch.local
        if batch.num_spans:
            here = self._places[0]
            local[:, 2] = here.device
            remote[:, 0] = peer.bases[batch.memory] + batch.remote
            remote[:, 2] = peer.devices[batch.memory]
        on_gpu = bool(self._places) and self._places[0].on_gpu
        return NixlRead(
            number, NixlSide(on_gpu, local), NixlSide(peer.on_gpu, remote), np.cumsum(local[:, 1], dtype=np.int64)
        )

    def poll(self) -> list[Completion]:
        return [] if self._closed else self._box.take()

    def fileno(self) -> int:
        return self._box.fileno

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        readers = [*self._leaving, *(peer.reader for peer in self._peers.values())]
        for reader in readers:
            reader.close()
        for reader in readers:
            reader.join()
        self._peers.clear()
        self._leaving.clear()
        if self._agent is not None:
            self._agent.close()
        self._box.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the nixl transport is closed")
