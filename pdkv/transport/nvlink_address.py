"""What an nvlink transport tells of itself, and whether that can be reached from here."""

import os
import select
from collections.abc import Sequence
from pathlib import Path

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import MemoryDescriptor, TransportAddress
from pdkv.transport.gpu import Exported
from pdkv.transport.sealed import seal, unseal

_MAGIC = b"pdkvnvl1"


class Home(msgspec.Struct, frozen=True, array_like=True):
    """Where a process lives: CUDA maps memory only between processes that see each other."""

    boot_id: str
    """Of the running kernel: equal on one host and on no other."""
    pid: int
    started: int
    """Clock ticks from the kernel's start to the process's: tells it from a later one of the same number."""
    pid_space: int
    """The process namespace that ``pid`` is a number of."""
    ipc_space: int
    gpu: str
    """UUID of the GPU that holds its memories; empty before any is registered."""

    @classmethod
    def own(cls, gpu: str) -> "Home":
        return cls(_boot_id(), os.getpid(), _started(os.getpid()), _namespace("pid"), _namespace("ipc"), gpu)


def encode(transport: str, home: Home, memories: Sequence[MemoryDescriptor]) -> TransportAddress:
    return TransportAddress(transport, seal(_MAGIC, msgspec.msgpack.encode(home)), tuple(memories))


def encode_key(exported: Exported) -> bytes:
    return seal(_MAGIC, msgspec.msgpack.encode(exported))


def decode(address: TransportAddress) -> tuple[Home, list[Exported]]:
    """Raises ``TransportError`` for an address that this version's nvlink transport did not make."""
    try:
        home = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=Home)
        keys = [
            msgspec.msgpack.decode(unseal(_MAGIC, memory.key, f"the key of the peer's memory {index}"), type=Exported)
            for index, memory in enumerate(address.memories)
        ]
    except msgspec.MsgspecError as error:
        raise TransportError(f"the peer's nvlink address says nothing that this version knows: {error}") from error
    if any(memory.length <= 0 or key.offset < 0 for memory, key in zip(address.memories, keys, strict=True)):
        raise TransportError("the peer describes memory outside its allocation")
    return home, keys


def obstacle(here: Home, there: Home) -> str:
    """Why CUDA cannot map memory of ``there``; empty where nothing is known to be in the way."""
    if there.boot_id != here.boot_id:
        return "the peer is on another host"
    if there.pid_space != here.pid_space:
        return (
            "the peer is in another process namespace, and CUDA maps memory within one only: run both in one pod with "
            "shareProcessNamespace, or with hostPID, or containers with --pid=host"
        )
    if there.pid == here.pid:
        return "the peer is this very process, and CUDA maps only the memory of others"
    return ""


def hint(here: Home, there: Home) -> str:
    """What may be behind CUDA's refusal to map; empty where nothing is suspicious."""
    if here.ipc_space != there.ipc_space:
        return "; the peer is in another IPC namespace, try hostIPC or --ipc=host"
    return ""


class Life:
    """The life of another process, seen through its pidfd. Owned by one thread; ``has_ended`` may be asked from any."""

    def __init__(self, home: Home) -> None:
        """``fd`` is readable once the process has ended, -1 if it had before."""
        self.fd = -1
        try:
            self.fd = os.pidfd_open(home.pid)
            if _started(home.pid) != home.started:
                self.close()
        except ProcessLookupError:
            self.close()
        except OSError as error:
            self.close()
            raise TransportError(f"the peer's process cannot be watched: {error}") from error

    @property
    def has_ended(self) -> bool:
        if self.fd < 0:
            return True
        poll = select.poll()  # takes descriptors that select cannot
        poll.register(self.fd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()


def _namespace(kind: str) -> int:
    return os.stat(f"/proc/self/ns/{kind}").st_ino  # noqa: PTH116  # follows a link that is no path


def _started(pid: int) -> int:
    """Raises ``ProcessLookupError`` when there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        raise ProcessLookupError(pid) from None
    return int(stat.rpartition(")")[2].split()[19])  # the name before may hold anything
