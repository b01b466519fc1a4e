"""Reads on one host out of a read-only mapping of the peer's memory: memcpy's speed, and no work for the peer.

The peer's memory is a memfd. Its descriptor, opened for reading only, comes by a unix socket whose name and token
travel on the control channel, or from /proc where the peer's process can be seen (another network namespace).
"""

import fcntl
import os
import secrets
import socket
from pathlib import Path

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport.pulling import MANY_PROCESSORS, FarEnd, FarMemory, PullingTransport, PullLimits
from pdkv.transport.sealed import seal, unseal

_MAGIC = b"pdkvshm1"

_NEVER_SHRINKS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
"""A mapping of a file that shrinks kills whoever reads its end; one that grows would not be the arena."""


class ShmOptions(msgspec.Struct, frozen=True):
    """How a ``ShmTransport`` copies."""

    copies: int = 0
    """Threads that copy at the same time, over all peers; 0 = two, or four where there are processors to spare. On two
    cores two reach the memory's speed, and more take it from the model; a server's memory feeds more than two."""
    slice_bytes: int = 1 << 20


class _Key(msgspec.Struct, frozen=True, array_like=True):
    inode: int = 0
    fd: int = -1
    """-1 = not a memfd: it can be read into, and not be read."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    boot_id: str
    """Of the running kernel: equal on one host and on no other."""
    name: bytes
    """Of the abstract unix socket."""
    token: bytes
    pid: int
    pid_space: int
    """The process namespace that ``pid`` is a number of."""


class ShmTransport(PullingTransport):
    """See ``Transport`` and ``PullingTransport``. Peers can read memory that is a whole memfd (``LocalMemory.memfd``);
    other memory is a destination only, and ``connect`` refuses its address.

    A peer that is stopped is read all the same; one that ended is not, although its bytes are still mapped.
    """

    name = "shm"
    reported_path = "shm"

    def __init__(self, options: ShmOptions | None = None) -> None:
        options = options or ShmOptions()
        self._name = f"pdkv-{secrets.token_hex(16)}".encode()
        self._fds: list[int] = []
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(b"\0" + self._name)
        listener.listen(128)
        copies = options.copies or (4 if len(os.sched_getaffinity(0)) >= MANY_PROCESSORS else 2)
        super().__init__(listener, PullLimits(copies, copies, options.slice_bytes))

    def _key_of(self, memory: LocalMemory) -> tuple[bytes, int]:
        if memory.memfd < 0:
            return seal(_MAGIC, msgspec.msgpack.encode(_Key())), -1
        try:
            _keep_size(memory)
            fd = os.open(f"/proc/self/fd/{memory.memfd}", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise TransportError(f"the memfd of {memory.length} bytes cannot be shared: {error}") from error
        self._fds.append(fd)
        return seal(_MAGIC, msgspec.msgpack.encode(_Key(os.fstat(fd).st_ino, fd))), fd

    def _own_address(self) -> bytes:
        own = _Address(_boot_id(), self._name, self._token, os.getpid(), _pid_space())
        return seal(_MAGIC, msgspec.msgpack.encode(own))

    def _far_end(self, address: TransportAddress) -> tuple[FarEnd, list[FarMemory]]:
        try:
            far = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=_Address)
            keys = [
                msgspec.msgpack.decode(unseal(_MAGIC, memory.key, f"the key of the peer's memory {index}"), type=_Key)
                for index, memory in enumerate(address.memories)
            ]
        except msgspec.MsgspecError as error:
            raise TransportError(f"the peer's shm address says nothing that this version knows: {error}") from error
        if far.boot_id != _boot_id():
            raise TransportError("the peer is on another host")
        if any(key.fd < 0 for key in keys):
            raise TransportError("the peer's memory is no memfd, and cannot be mapped")
        pid = far.pid if far.pid_space == _pid_space() else 0
        memories = [
            FarMemory(memory.length, key.inode, key.fd) for memory, key in zip(address.memories, keys, strict=True)
        ]
        return FarEnd(far.name, far.token, pid=pid), memories

    def close(self) -> None:
        super().close()
        while self._fds:
            os.close(self._fds.pop())


def _keep_size(memory: LocalMemory) -> None:
    """Seal the memfd at its size, unless its maker has. Raises ``OSError`` when it cannot be."""
    seals = fcntl.fcntl(memory.memfd, fcntl.F_GET_SEALS)
    if seals & _NEVER_SHRINKS != _NEVER_SHRINKS:
        fcntl.fcntl(memory.memfd, fcntl.F_ADD_SEALS, _NEVER_SHRINKS)
    size = os.fstat(memory.memfd).st_size
    if size < memory.length:
        raise OSError(f"it has {size} bytes only")


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _pid_space() -> int:
    return os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116  # follows a link that is no path
