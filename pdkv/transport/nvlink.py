"""Reads of GPU memory on one host, between two GPUs or two processes of one: the peer's memory is mapped by CUDA IPC.

Long spans (rows of an arena) go by the copy engines in one call, short ones (pieces of per-layer tensors) by one kernel
of few thread blocks. The peer does nothing, and may even be stopped.
"""

import logging
import os
import select
import threading
from collections import deque
from collections.abc import Callable

import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.cuda_gpu import CudaGpu
from pdkv.transport.gpu import Exported, Gpu, SpanTable
from pdkv.transport.nvlink_address import Home, decode, encode, encode_key, hint, obstacle
from pdkv.transport.nvlink_peer import ENDED, NUM_STREAMS, NvlinkPeer, Work
from pdkv.transport.nvlink_posting import PART_SPANS, Posting
from pdkv.transport.nvlink_spans import ROW_BYTES, Seen, SpanBounds, check_extension
from pdkv.transport.process_life import Life

log = logging.getLogger("pdkv.transport.nvlink")

_READY_TABLES = 4
"""Made when the first peer is connected; what a read needs beyond that is made then, and kept."""

_NEVER = 1 << 62
"""Bytes that no span has: without batches of copies the kernel takes all."""

_MOST_BLOCKS = 1024


class NvlinkTransport(Transport):
    """See ``Transport``. Everything it holds belongs to the owner's thread, but for completions and span tables, which
    its peers' threads hand back under a lock. All memory is of one GPU. Not for use after a fork (spawn instead).
    """

    name = "nvlink"

    def __init__(
        self, blocks: int = 64, *, row_bytes: int = ROW_BYTES, gpu_of: Callable[[int], Gpu] = CudaGpu.of
    ) -> None:
        """``blocks``: most thread blocks of the kernel that gathers short spans. ``row_bytes``: from which length on a
        span goes to the copy engines. ``gpu_of``: opens the GPU that holds an address. CUDA is touched when the first
        memory is registered."""
        check_extension()
        if not 0 < blocks <= _MOST_BLOCKS:
            raise TransportError(f"nvlink: {blocks} thread blocks are not between 1 and {_MOST_BLOCKS}")
        self._blocks = max(1, blocks // NUM_STREAMS)
        """Of one kernel; one a stream runs at a time."""
        self._row_bytes = row_bytes
        self._gpu_of = gpu_of
        self._gpu: Gpu | None = None
        self._memories: list[LocalMemory] = []
        self._descriptors: list[MemoryDescriptor] = []
        self._peers: dict[PeerId, NvlinkPeer] = {}
        self._closing: list[NvlinkPeer] = []
        self._next_peer = 0
        self._next_read = 0
        self._lock = threading.Lock()
        self._done: deque[Completion] = deque()
        self._tables: list[SpanTable] = []
        self._closed = False
        self._ready = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._ready, select.EPOLLIN)

    # ---- this side ----

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        if memory.device == "cpu" or memory.address <= 0 or memory.length <= 0:
            raise TransportError(f"nvlink cannot register {memory}: it takes memory of NVIDIA GPUs")
        if self._gpu is None:
            self._gpu = self._gpu_of(memory.address)
        if not self._gpu.holds(memory.address, memory.length):
            raise TransportError(
                f"nvlink cannot register {memory}: it is not one allocation of the GPU that holds the first memory"
            )
        try:
            key = encode_key(self._gpu.export(memory.address))
        except TransportError as error:
            raise TransportError(
                f"the {memory.length} bytes on {memory.device} cannot be mapped by other processes ({error}): allocate "
                "them by cudaMalloc, not from a pool"
            ) from error
        descriptor = MemoryDescriptor(address=memory.address, length=memory.length, key=key)
        self._memories.append(memory)
        self._descriptors.append(descriptor)
        for peer in self._peers.values():
            peer.bounds = None
        return descriptor

    def address(self) -> TransportAddress:
        home = Home.own(self._gpu.uuid if self._gpu is not None else "")
        return encode(self.name, home, self._descriptors)

    # ---- peers ----

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        if address.transport != self.name:
            raise TransportError(f"an nvlink transport cannot reach a {address.transport!r} address")
        there, keys = decode(address)
        if self._gpu is None:
            raise TransportError("nvlink: register the memory that is read into before connecting to a peer")
        here = Home.own(self._gpu.uuid)
        if why := obstacle(here, there) or self._gpu.refusal(there.gpu):
            raise TransportError(why)
        if not self._peers and not self._tables:  # now, so that the first read does not wait for the compiler
            self._tables += [self._gpu.make_table(PART_SPANS) for _ in range(_READY_TABLES)]
        number = PeerId(self._next_peer)
        peer = NvlinkPeer(self._gpu, Life(there), address.memories, self._finish)
        if peer.life.has_ended:
            peer.lose(ENDED)
        else:
            self._open(peer, keys, f"pdkv-nvlink-{number}", hint(here, there))
        self._next_peer += 1
        self._peers[number] = peer
        return number

    def _open(self, peer: NvlinkPeer, keys: list[Exported], name: str, suspicion: str) -> None:
        """A peer that cannot be mapped because it died meanwhile is one that died; any other will never be mapped."""
        try:
            peer.open(keys, name)
        except TransportError as error:
            if not peer.life.has_ended:
                peer.life.close()
                raise TransportError(f"the peer's memory cannot be mapped: {error}{suspicion}") from error
            peer.lose(ENDED)
            return
        self._epoll.register(peer.life.fd, select.EPOLLIN)

    def close_peer(self, peer: PeerId) -> None:
        known = self._peers.pop(peer, None)
        if known is None:
            return
        self._unwatch(known)
        known.close()
        self._closing.append(known)

    def path(self, peer: PeerId) -> str:
        known = self._peers.get(peer)
        return "cuda_ipc" if known is not None and known.has_carried else "unknown"

    def _unwatch(self, peer: NvlinkPeer) -> None:
        if not peer.broken:
            self._epoll.unregister(peer.life.fd)

    # ---- reads ----

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        batch = ReadBatch(*(_int64(a) for a in (batch.memory, batch.remote, batch.local, batch.length)))
        if len({batch.memory.size, batch.remote.size, batch.local.size, batch.length.size}) != 1:
            raise TransportError("a batch that is none: its four arrays differ in length")
        read = ReadId(self._next_read)
        self._next_read += 1
        known = self._peers.get(peer)
        if known is None:
            self._tell(Completion(read, ReadStatus.FAILED, f"peer {peer} is closed"))
            return read
        if not known.broken and known.life.has_ended:
            self._lose(known)
        seen = self._look(known, batch)
        if fault := seen.fault or known.broken:
            self._tell(Completion(read, ReadStatus.FAILED, fault))
        else:
            known.add(self._post(known, read, batch, seen))
        return read

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        awake = {fd for fd, _ in self._epoll.poll(0)}
        for peer in [peer for peer in self._peers.values() if not peer.broken and peer.life.fd in awake]:
            self._lose(peer)
        self._closing = [peer for peer in self._closing if not peer.is_gone()]
        with self._lock:
            done = list(self._done)
            self._done.clear()
            if done:
                os.eventfd_read(self._ready)
        return done

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        for peer in self._peers.values():
            peer.close()
        for peer in (*self._peers.values(), *self._closing):
            peer.join()
        self._peers.clear()
        self._closing.clear()
        if self._gpu is not None:
            for table in self._tables:
                self._gpu.drop_table(table)
            self._gpu.close()
        self._epoll.close()
        os.close(self._ready)

    # ---- the inside ----

    def _lose(self, peer: NvlinkPeer) -> None:
        log.info("a peer's process has ended; its memory is unmapped")
        self._unwatch(peer)
        peer.lose(ENDED)

    def _look(self, peer: NvlinkPeer, batch: ReadBatch) -> Seen:
        assert self._gpu is not None, "a peer is connected"
        if peer.bounds is None:
            peer.bounds = SpanBounds(peer.memories, tuple(self._memories))
        return peer.bounds.look(batch, self._long_bytes(self._gpu))

    def _long_bytes(self, gpu: Gpu) -> int:
        """From how many bytes on a span is a row."""
        return self._row_bytes if gpu.can_copy_batches else _NEVER

    def _post(self, peer: NvlinkPeer, read: ReadId, batch: ReadBatch, seen: Seen) -> Work:
        """Put a sound batch on the peer's streams."""
        gpu = self._gpu
        assert gpu is not None, "a peer is connected"
        posting = Posting(gpu, peer, self._blocks, lambda: self._take_table(gpu))
        bases = np.array(peer.mapping.bases or (0,), dtype=np.int64)
        return posting.post(read, batch, bases, self._long_bytes(gpu), seen)

    def _take_table(self, gpu: Gpu) -> SpanTable:
        with self._lock:
            if self._tables:
                return self._tables.pop()
        return gpu.make_table(PART_SPANS)

    def _finish(self, completion: Completion, work: Work) -> None:
        """Called by the threads of peers."""
        with self._lock:
            self._tables += work.tables
        self._tell(completion)

    def _tell(self, completion: Completion) -> None:
        with self._lock:  # the descriptor tells exactly whether there is something
            self._done.append(completion)
            os.eventfd_write(self._ready, 1)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the nvlink transport is closed")


def _int64(array: Int64Array) -> Int64Array:
    return np.ascontiguousarray(array, dtype=np.int64)
