"""The one seam between the protocol and the bytes: pages and numbers only, no words of models or requests."""

from abc import ABC, abstractmethod
from enum import Enum
from typing import NewType

import msgspec

from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress

PeerId = NewType("PeerId", int)
"""A connected peer of one transport; never reused within its life."""

ReadId = NewType("ReadId", int)
"""One submitted batch of one transport; never reused within its life."""


class ReadStatus(Enum):
    OK = "ok"
    """Every byte of the batch is in local memory, visible to whatever runs after ``poll`` returned this."""
    FAILED = "failed"
    """The peer or the path failed, or a range was refused; destination bytes are undefined but no longer written."""
    CANCELLED = "cancelled"
    """``close_peer`` or ``close`` ended it; destination bytes are undefined but no longer written."""


class Completion(msgspec.Struct, frozen=True):
    """The end of one submitted batch. Whatever the status, nothing writes to its destination afterwards."""

    read: ReadId
    status: ReadStatus
    error: str = ""


class Transport(ABC):
    """Reads spans of a peer's registered memory into local memory.

    Owned by one thread, which makes every call below; nothing here blocks for the network. A batch submitted is
    completed exactly once, by ``poll``, errors included. Memory handed to ``register`` and destinations of
    reads belong to the caller and must stay mapped until ``close`` (registered memory) or the batch's completion.

    Errors: ``TransportError`` for what can never work (no such library, memory that cannot be registered, an address
    that cannot be parsed). Everything a peer or the network does arrives as a ``Completion``.
    """

    name: str
    """Implementation, as in ``--transport``: "ucx", "inproc"."""

    @abstractmethod
    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        """Make ``memory`` readable by peers until ``close``, and a legal destination of this transport's reads."""

    @abstractmethod
    def address(self) -> TransportAddress:
        """Where peers reach this transport, with every memory registered so far, in the order of registration."""

    @abstractmethod
    def connect(self, address: TransportAddress) -> PeerId:
        """Open the way to a peer. Returns at once; an unreachable peer shows as failed completions."""

    @abstractmethod
    def close_peer(self, peer: PeerId) -> None:
        """Close by force and finally: outstanding batches complete as cancelled (through ``poll``), and once they
        have, no byte from that peer lands. Closing twice is harmless."""

    @abstractmethod
    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        """Start reading. Never blocks; the arrays are copied or consumed before it returns. A batch with a range
        outside the peer's memory or outside local registered memory completes as FAILED: neither that range is read nor
        what comes after it; what comes before may be. A batch for a closed peer reads nothing and completes as FAILED.
        An empty batch completes OK."""

    @abstractmethod
    def poll(self) -> list[Completion]:
        """Completions since the last call, oldest first. Never blocks."""

    @abstractmethod
    def fileno(self) -> int:
        """A descriptor that is readable while ``poll`` has something to return; for the owner's poller."""

    @abstractmethod
    def path(self, peer: PeerId) -> str:
        """What carries this peer's bytes: "rdma", "cuda_ipc", "shm", "tcp", "inproc", or "unknown" before the first
        read has completed."""

    def note(self, peer: PeerId) -> str:
        """What else there is to say of how this peer's bytes travel, such as "staged through pinned host memory"; empty
        when there is nothing. For logs and people."""
        return ""

    def crawls(self, peer: PeerId) -> bool:
        """Whether reads of this peer, seen how the first one went, go at a small part of what its path could carry."""
        return False

    @abstractmethod
    def close(self) -> None:
        """Close all peers, deregister all memory, end all threads. Outstanding batches are cancelled and lost.
        Idempotent."""
