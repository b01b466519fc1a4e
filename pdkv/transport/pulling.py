"""What shm and sockets share: a native puller that reads, a native host that is read, and a token between the two."""

import secrets
import socket
from abc import abstractmethod

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport

try:
    from pdkv.transport._pull import MAX_HOST, MAX_MEMORIES, TOKEN_SIZE, Device, Host, Puller

    _EXTENSION_ERROR: ImportError | None = None
except ImportError as missing:
    _EXTENSION_ERROR = missing

_STATUS = (ReadStatus.OK, ReadStatus.FAILED, ReadStatus.CANCELLED)
"""By the native puller's numbers."""

_MOST_BYTES = 1 << 62

MANY_PROCESSORS = 16
"""From so many on a worker can spare twice as many threads for moving bytes."""


class PullLimits(msgspec.Struct, frozen=True):
    """How much a puller does at a time."""

    streams: int
    """Threads of one peer; over TCP each has a connection of its own."""
    copies: int
    """Threads that copy out of mappings at the same time, over all peers."""
    slice_bytes: int
    """Most bytes that a thread takes at once: what a close waits for, and an eighth of what TCP asks for ahead."""
    staged_slice_bytes: int = 0
    """The same where bytes pass through pinned host memory; 0 = they cannot, and GPU memory is refused."""
    emulated_copy_us: int = 0
    """What each copy of memory on "emulated", the tests' stand-in for a GPU, takes."""


class FarEnd(msgspec.Struct, frozen=True):
    """Where a peer's host listens. ``port`` 0: ``host`` names a unix socket, and memory is mapped."""

    host: bytes
    token: bytes
    port: int = 0
    pid: int = 0
    """Of the peer's process, where it can be seen; only for mapping."""


class FarMemory(msgspec.Struct, frozen=True):
    """One of the peer's memories. Inode and descriptor (in the peer's process): only for mapping."""

    length: int
    inode: int = 0
    fd: int = -1


class PullingTransport(Transport):
    """See ``Transport``. All bytes move on native threads without the GIL; as the target of reads it needs nothing of
    the owner. Subclasses say what an address is. Not for use after a fork (spawn instead)."""

    reported_path: str

    def __init__(self, listener: socket.socket, limits: PullLimits) -> None:
        """Takes over ``listener``. Raises ``TransportError`` when the extension is missing or threads are short."""
        if _EXTENSION_ERROR is not None:
            listener.close()
            raise TransportError(
                f"pdkv's native readers are not built ({_EXTENSION_ERROR}): install pdkv with pip, "
                "or run `python setup.py build_ext --inplace` in a checkout"
            ) from _EXTENSION_ERROR
        self._closed = False
        self._limits = limits
        self._device: Device | None = None
        self._has_peers = False
        self._token = secrets.token_bytes(TOKEN_SIZE)
        self._memories: list[MemoryDescriptor] = []
        try:
            self._puller = Puller(limits.streams, limits.copies, limits.slice_bytes)
            self._host = Host(listener.detach(), self._token)
        except MemoryError as error:
            raise TransportError(f"{self.name}: no room for another thread or descriptor; raise ulimit -n") from error
        self._fileno = self._puller.fileno()

    # ---- what subclasses say ----

    @abstractmethod
    def _key_of(self, memory: LocalMemory) -> tuple[bytes, int]:
        """The descriptor's key, and the file descriptor that peers are handed (-1 = none)."""

    @abstractmethod
    def _own_address(self) -> bytes: ...

    @abstractmethod
    def _far_end(self, address: TransportAddress) -> tuple[FarEnd, list[FarMemory]]:
        """Raises ``TransportError`` when the address is not one of this transport's, or cannot be reached from here."""

    # ---- Transport ----

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        if (
            memory.address <= 0
            or memory.length <= 0
            or (memory.device != "cpu" and not self._limits.staged_slice_bytes)
        ):
            taken = "memory" if self._limits.staged_slice_bytes else "CPU memory"
            raise TransportError(f"{self.name} cannot register {memory}: it takes {taken} of positive length")
        if len(self._memories) == MAX_MEMORIES:
            raise TransportError(f"{self.name} takes at most {MAX_MEMORIES} memories")
        self._use_device_of(memory)
        key, fd = self._key_of(memory)
        self._host.add_memory(memory.address, memory.length, fd)
        self._puller.add_destination(memory.address, memory.length)
        descriptor = MemoryDescriptor(address=memory.address, length=memory.length, key=key)
        self._memories.append(descriptor)
        return descriptor

    def _use_device_of(self, memory: LocalMemory) -> None:
        """Get ready to stage, if the memory is a GPU's. All memory of a transport lies on the same device."""
        if self._memories and (memory.device != "cpu") != (self._device is not None):
            raise TransportError(f"{self.name} takes memory of one device, and {memory.device} is another than before")
        if memory.device == "cpu":
            return
        if self._device is None and self._has_peers:
            raise TransportError(f"{self.name} takes memory on {memory.device} only before it reads from anybody")
        try:
            device = self._device or Device(memory.device, self._limits.emulated_copy_us)
            device.adopt(memory.address, memory.length, memory.memfd, self._limits.staged_slice_bytes)
        except OSError as error:
            raise TransportError(
                f"{self.name} cannot stage {memory.length} bytes on {memory.device}: {error}"
            ) from error
        if self._device is None:
            self._device = device
            self._puller.use_device(device, self._limits.staged_slice_bytes)
            self._host.use_device(device, self._limits.staged_slice_bytes)

    def address(self) -> TransportAddress:
        return TransportAddress(transport=self.name, address=self._own_address(), memories=tuple(self._memories))

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        if address.transport != self.name:
            raise TransportError(f"a {self.name} transport cannot reach a {address.transport!r} address")
        end, memories = self._far_end(address)
        if len(memories) > MAX_MEMORIES or len(end.host) > MAX_HOST or len(end.token) != TOKEN_SIZE:
            raise TransportError(f"the peer's {self.name} address has more memories or longer names than there can be")
        if not all(0 < memory.length < _MOST_BYTES for memory in memories):
            raise TransportError("the peer describes memory outside its address space")
        known = [(memory.length, memory.inode, memory.fd) for memory in memories]
        self._has_peers = True
        try:
            return PeerId(self._puller.connect(end.token, end.host, end.port, end.pid, known))
        except MemoryError as error:
            raise TransportError(f"{self.name}: no room for the threads of another peer") from error

    def close_peer(self, peer: PeerId) -> None:
        if not self._closed:
            self._puller.close_peer(peer)

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        arrays = [
            np.ascontiguousarray(array, dtype=np.int64)
            for array in (batch.memory, batch.remote, batch.local, batch.length)
        ]
        try:
            return ReadId(self._puller.submit(peer, *arrays))
        except ValueError as error:
            raise TransportError(f"a batch that is none: {error}") from error

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        return [Completion(ReadId(read), _STATUS[status], error) for read, status, error in self._puller.poll()]

    def fileno(self) -> int:
        return self._fileno

    def path(self, peer: PeerId) -> str:
        return self.reported_path if not self._closed and self._puller.has_carried(peer) else "unknown"

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._puller.close()
            self._host.close()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError(f"the {self.name} transport is closed")
