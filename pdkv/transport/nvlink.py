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
from pdkv.transport.gpu import Exported, Gpu, GpuSpans, SpanTable
from pdkv.transport.nvlink_address import Home, Life, decode, encode, encode_key, hint, obstacle
from pdkv.transport.nvlink_peer import ENDED, NvlinkPeer, Work
from pdkv.transport.nvlink_spans import ROW_BYTES, growing_parts, split
from pdkv.transport.ranges import fault_of

log = logging.getLogger("pdkv.transport.nvlink")

_PART_SPANS = 1 << 15
"""Most that is put on a stream at a time: a table of so many is 768 KiB."""

_FIRST_SPANS = 1 << 11
"""Of the first part. Parts double: laying one out takes about as long as copying half of it."""

_FIRST_ROWS = 32
"""What the copy engines get first: the driver takes 1 us for each row, and begins when it has been told of all."""

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
        if not 0 < blocks <= _MOST_BLOCKS:
            raise TransportError(f"nvlink: {blocks} thread blocks are not between 1 and {_MOST_BLOCKS}")
        self._blocks = blocks
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
            self._tables.append(self._gpu.make_table(_PART_SPANS))
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
        fault = fault_of(batch, known.memories, self._memories) or known.broken
        if fault:
            self._tell(Completion(read, ReadStatus.FAILED, fault))
        else:
            known.add(self._post(known, read, batch))
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

    def _post(self, peer: NvlinkPeer, read: ReadId, batch: ReadBatch) -> Work:
        """Put a sound batch on the peer's streams."""
        assert self._gpu is not None, "a peer is connected"
        gpu, bases = self._gpu, np.array(peer.mapping.bases or (0,), dtype=np.int64)
        tables: list[SpanTable] = []
        streams: set[int] = set()
        error = ""
        try:
            for part in growing_parts(batch.num_spans, _FIRST_SPANS, 2, _PART_SPANS):
                parts = split(_absolute(batch, bases, part), self._row_bytes if gpu.can_copy_batches else _NEVER)
                for few in growing_parts(parts.pieces.count, _PART_SPANS, 1, _PART_SPANS):
                    streams.add(peer.kernels)
                    tables.append(self._take_table(gpu))
                    gpu.gather(parts.pieces.part(few), tables[-1], self._blocks, peer.kernels)
                for few in growing_parts(parts.rows.count, _FIRST_ROWS, 8, _PART_SPANS):
                    streams.add(peer.copies)
                    gpu.copy(parts.rows.part(few), peer.copies)
        except TransportError as refused:
            error = str(refused)
        events = []
        for stream in streams:
            try:
                events.append(gpu.mark(stream))
            except TransportError as refused:  # then nothing of that stream can be waited for, or runs any more
                error = error or str(refused)
        return Work(read, tuple(events), tuple(tables), error)

    def _take_table(self, gpu: Gpu) -> SpanTable:
        with self._lock:
            if self._tables:
                return self._tables.pop()
        return gpu.make_table(_PART_SPANS)

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


def _absolute(batch: ReadBatch, bases: Int64Array, part: slice) -> GpuSpans:
    """Some spans of a batch by addresses; ``bases`` are those of the peer's memories."""
    base = bases if bases.size == 1 else bases[batch.memory[part]]
    return GpuSpans(batch.local[part], base + batch.remote[part], batch.length[part])


def _int64(array: Int64Array) -> Int64Array:
    return np.ascontiguousarray(array, dtype=np.int64)
