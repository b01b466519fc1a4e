"""Reads within one process by memcpy, with faults on order: delay, reorder, truncation and failure from a seed."""

import ctypes
import itertools
import os
import random
import threading

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.ranges import fault_of, int64_copy

_registry: dict[bytes, "InprocTransport"] = {}
"""Open transports of this process by address. Guarded by ``_registry_lock``, also while bytes are copied, so that no
memory disappears under a copy."""
_registry_lock = threading.RLock()
_numbers = itertools.count(1)


class Faults(msgspec.Struct, frozen=True):
    """What goes wrong, drawn batch by batch from ``seed``: the same submissions meet the same faults.

    Delays are counted in calls of ``poll``, so tests that use them neither sleep nor depend on the clock. A batch that
    is delayed is *copied* late too, when it completes: a page reused too early shows in the bytes.
    """

    seed: int = 0
    max_delay_polls: int = 0
    """A batch completes after 0 to this many further calls of ``poll``."""
    reorder: float = 0.0
    """Share of completions that overtake an earlier one of the same poll."""
    fail: float = 0.0
    """Share of batches that copy nothing and complete FAILED."""
    truncate: float = 0.0
    """Share of batches that copy only a part and complete FAILED."""


class _Read(msgspec.Struct, eq=False):
    """A batch on its way; owned by the transport that submitted it."""

    id: ReadId
    peer: PeerId
    batch: ReadBatch
    polls_left: int
    spans_to_copy: int
    """Fewer than the batch has: it fails after these."""
    error: str


class InprocTransport(Transport):
    """See ``Transport``. Peers are other ``InprocTransport`` objects of this process, whichever thread owns them.

    ``fileno`` is readable as long as any read has not been returned by ``poll``: an owner that blocks on it polls
    again at once, which is what counts a delay down, and never hangs.
    """

    name = "inproc"

    def __init__(self, faults: Faults | None = None) -> None:
        self._faults = faults or Faults()
        self._random = random.Random(self._faults.seed)
        self._address = f"inproc-{os.getpid()}-{next(_numbers)}".encode()
        self._memories: list[LocalMemory] = []
        self._peers: dict[PeerId, TransportAddress] = {}
        self._paths: dict[PeerId, str] = {}
        self._reads: list[_Read] = []
        self._done: list[Completion] = []
        self._next_peer = 0
        self._next_read = 0
        self._eventfd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._signalled = False
        self._closed = False
        with _registry_lock:
            _registry[self._address] = self

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        if memory.device != "cpu" or memory.address <= 0 or memory.length <= 0:
            raise TransportError(f"inproc cannot register {memory}: it takes CPU memory of positive length")
        with _registry_lock:
            self._memories.append(memory)
        return self._describe(memory)

    def address(self) -> TransportAddress:
        memories = tuple(self._describe(memory) for memory in self._memories)
        return TransportAddress(transport=self.name, address=self._address, memories=memories)

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        if address.transport != self.name:
            raise TransportError(f"an inproc transport cannot reach a {address.transport!r} address")
        if not address.address.startswith(b"inproc-"):
            raise TransportError(f"{address.address!r} is no inproc address")
        peer = PeerId(self._next_peer)
        self._next_peer += 1
        self._peers[peer] = address
        return peer

    def close_peer(self, peer: PeerId) -> None:
        if self._peers.pop(peer, None) is None:
            return
        for read in [read for read in self._reads if read.peer == peer]:
            self._end(read, ReadStatus.CANCELLED, f"peer {peer} was closed")
        self._signal()

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        batch = int64_copy(batch)
        if len({batch.memory.size, batch.remote.size, batch.local.size, batch.length.size}) != 1:
            raise TransportError("a batch that is none: its four arrays differ in length")
        read = self._draw(peer, batch)
        if fault := self._fault_of(peer, batch):
            read.spans_to_copy, read.error = 0, fault
        self._reads.append(read)
        self._signal()
        return read.id

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        for read in list(self._reads):
            if read.polls_left > 0:
                read.polls_left -= 1
            else:
                self._finish(read)
        done, self._done = self._done, []
        for i in range(1, len(done)):
            if self._random.random() < self._faults.reorder:
                done[i - 1], done[i] = done[i], done[i - 1]
        self._signal()
        return done

    def fileno(self) -> int:
        return self._eventfd

    def path(self, peer: PeerId) -> str:
        return self._paths.get(peer, "unknown")

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        with _registry_lock:
            del _registry[self._address]
            self._memories.clear()
        self._reads.clear()
        self._peers.clear()
        os.close(self._eventfd)

    def __del__(self) -> None:
        if hasattr(self, "_closed"):
            self.close()

    # ---- the inside ----

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the inproc transport is closed")

    @staticmethod
    def _describe(memory: LocalMemory) -> MemoryDescriptor:
        return MemoryDescriptor(address=memory.address, length=memory.length, key=b"inproc")

    def _draw(self, peer: PeerId, batch: ReadBatch) -> _Read:
        """The batch with its fate. Always draws the same number of times, so that fates do not depend on each other."""
        faults, draw = self._faults, self._random
        polls_left = draw.randint(0, faults.max_delay_polls)
        fails, truncates, share = draw.random() < faults.fail, draw.random() < faults.truncate, draw.random()
        read = _Read(ReadId(self._next_read), peer, batch, polls_left, batch.num_spans, "")
        self._next_read += 1
        if fails:
            read.spans_to_copy, read.error = 0, "injected failure"
        elif truncates:
            read.spans_to_copy, read.error = int(share * batch.num_spans), "injected truncation"
        return read

    def _fault_of(self, peer: PeerId, batch: ReadBatch) -> str:
        """Why the batch is refused before a byte of it is read; empty when it is not."""
        address = self._peers.get(peer)
        if address is None:
            return f"peer {peer} is closed"
        return fault_of(batch, address.memories, self._memories)

    def _finish(self, read: _Read) -> None:
        address = self._peers.get(read.peer)
        with _registry_lock:
            target = _registry.get(address.address) if address else None
            # The descriptors are the peer's word; the memory itself must still be registered there.
            lost = address is not None and (target is None or not _same(target._memories, address))
            if address is not None and not lost:
                _copy(address, read.batch, read.spans_to_copy)
        if lost and not read.error:
            read.error = f"peer {read.peer} is lost: its transport is closed"
        if not read.error:
            self._paths[read.peer] = "inproc"
        self._end(read, ReadStatus.FAILED if read.error else ReadStatus.OK, read.error)

    def _end(self, read: _Read, status: ReadStatus, error: str) -> None:
        self._reads.remove(read)
        self._done.append(Completion(read.id, status, error))

    def _signal(self) -> None:
        """Keep the descriptor readable exactly while something is under way."""
        wanted = bool(self._reads or self._done)
        if wanted and not self._signalled:
            os.eventfd_write(self._eventfd, 1)
        elif self._signalled and not wanted:
            os.eventfd_read(self._eventfd)
        self._signalled = wanted


def _same(memories: list[LocalMemory], address: TransportAddress) -> bool:
    registered = [(memory.address, memory.length) for memory in memories]
    described = [(memory.address, memory.length) for memory in address.memories]
    return registered[: len(described)] == described


def _copy(address: TransportAddress, batch: ReadBatch, num_spans: int) -> None:
    bases = [memory.address for memory in address.memories]
    spans = zip(
        batch.memory[:num_spans].tolist(),
        batch.remote[:num_spans].tolist(),
        batch.local[:num_spans].tolist(),
        batch.length[:num_spans].tolist(),
        strict=True,
    )
    for memory, remote, local, length in spans:
        ctypes.memmove(local, bases[memory] + remote, length)
