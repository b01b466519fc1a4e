"""What an nvlink transport tells of itself, and whether that can be reached from here."""

import os
from collections.abc import Sequence

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import MemoryDescriptor, TransportAddress
from pdkv.transport.gpu import Exported
from pdkv.transport.process_life import ProcessHome, namespace
from pdkv.transport.sealed import seal, unseal

_MAGIC = b"pdkvnvl1"


class Home(ProcessHome, frozen=True, array_like=True):
    """Where a process and its GPU live: CUDA maps memory only between processes that see each other."""

    ipc_space: int
    gpu: str
    """UUID of the GPU that holds its memories; empty before any is registered."""

    @classmethod
    def own(cls, gpu: str) -> "Home":
        own = ProcessHome.of(os.getpid())
        return cls(own.boot_id, own.pid, own.started, own.pid_space, namespace("ipc"), gpu)


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
