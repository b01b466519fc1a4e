"""Reads of GPU memory on one host, between two GPUs or two processes of one: the peer's memory is mapped by CUDA IPC.

Long spans (rows of an arena) go by the copy engines in one call, short ones (pieces of per-layer tensors) by one kernel
of few thread blocks. The peer does nothing, and may even be stopped.
"""

import logging
import select
from collections.abc import Callable

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.cuda_gpu import CudaGpu
from pdkv.transport.gpu import Exported, Gpu, SpanTable
from pdkv.transport.nvlink_address import Home, decode, encode, encode_key, hint, obstacle
from pdkv.transport.nvlink_peer import ENDED, NUM_STREAMS, NvlinkPeer, Work
from pdkv.transport.nvlink_posting import BAD_SPAN, PART_SPANS, PEER_ENDED, ROW_BYTES, Pace, post
from pdkv.transport.nvlink_spans import Bounds, Driver, Ends, Posting, check_extension
from pdkv.transport.process_life import Life
from pdkv.transport.ranges import fault_of

log = logging.getLogger("pdkv.transport.nvlink")

_READY_TABLES = 4
"""Made when the first peer is connected; what a read needs beyond that is made then, and kept."""

_NEVER = 1 << 62
"""Bytes that no span has: without batches of copies the kernel takes all."""

_MOST_BLOCKS = 1024


class NvlinkTransport(Transport):
    """See ``Transport``. Everything it holds belongs to the owner's thread, but native threads, one a peer, add to
    ``_ends``. All memory is of one GPU. Not for use after a fork (spawn instead)."""

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
        self._driver: Driver | None = None
        self._pace: tuple[int, ...] = ()
        self._memories: list[LocalMemory] = []
        self._descriptors: list[MemoryDescriptor] = []
        self._peers: dict[PeerId, NvlinkPeer] = {}
        self._closing: list[NvlinkPeer] = []
        self._next_peer = 0
        self._next_read = 0
        self._ends = Ends()
        self._under_way: dict[ReadId, tuple[NvlinkPeer | None, Work]] = {}
        """Reads that nobody was told the end of."""
        self._tables: list[SpanTable] = []
        """That nothing uses."""
        self._closed = False
        self._epoll = select.epoll()
        self._epoll.register(self._ends.fileno(), select.EPOLLIN)

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
            peer.posting = None
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
        driver = self._driver or self._make_ready(self._gpu)
        number = PeerId(self._next_peer)
        peer = NvlinkPeer(self._gpu, driver, Life(there), address.memories, self._ends)
        if peer.life.has_ended:
            peer.lose(ENDED)
        else:
            self._open(peer, keys, hint(here, there))
        self._next_peer += 1
        self._peers[number] = peer
        return number

    def _make_ready(self, gpu: Gpu) -> Driver:
        """For the first peer, so that the first read does not wait for the compiler."""
        driver = Driver(gpu.calls())
        self._tables += [gpu.make_table(PART_SPANS) for _ in range(_READY_TABLES)]
        row_bytes = self._row_bytes if gpu.can_copy_batches else _NEVER
        self._pace = msgspec.structs.astuple(Pace(row_bytes, blocks=self._blocks))
        self._driver = driver
        return driver

    def _open(self, peer: NvlinkPeer, keys: list[Exported], suspicion: str) -> None:
        """A peer that cannot be mapped because it died meanwhile is one that died; any other will never be mapped."""
        try:
            peer.open(keys)
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
        read = ReadId(self._next_read)
        self._next_read += 1
        known = self._peers.get(peer)
        if known is None or known.broken:
            self._fail(read, known.broken if known is not None else f"peer {peer} is closed")
            return read
        posting = known.posting or self._prepare(known)
        try:
            work, ended = post(read, known, posting, batch, self._take_table)
        except ValueError:  # asked afterwards, for asking takes longer than all of this
            work, ended = post(read, known, posting, _sound(batch), self._take_table)
        if ended == PEER_ENDED:
            self._lose(known)
            self._fail(read, known.broken)
            return read
        if ended == BAD_SPAN:
            fault = fault_of(batch, known.memories, self._memories) or "a range lies outside registered memory"
            work = msgspec.structs.replace(work, error=fault)
        self._under_way[read] = (known, work)
        known.add(work)
        return read

    def _prepare(self, peer: NvlinkPeer) -> Posting:
        """What posts the batches of a peer."""
        bounds = Bounds([m.length for m in peer.memories], [(m.address, m.length) for m in self._memories])
        peer.posting = Posting(peer.driver, bounds, peer.bases(), self._pace, peer.streams, peer.life.fd)
        return peer.posting

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        ended = self._ends.take()
        completions = [self._end_of(ReadId(read), code) for read, code in ended]
        awake = {fd for fd, _ in self._epoll.poll(0)}
        if awake:
            for peer in [peer for peer in self._peers.values() if not peer.broken and peer.life.fd in awake]:
                self._lose(peer)
        if self._closing:
            self._closing = [peer for peer in self._closing if not peer.is_gone()]
        return completions

    def _end_of(self, read: ReadId, code: int) -> Completion:
        peer, work = self._under_way.pop(read)
        self._tables += work.tables
        return peer.end_of(work, code) if peer is not None else Completion(read, ReadStatus.FAILED, work.error)

    def _fail(self, read: ReadId, why: str) -> None:
        """Of a read that has not begun."""
        self._under_way[read] = (None, Work(read, (), (), why))
        self._ends.add(read)

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
            self._tables += [table for _, work in self._under_way.values() for table in work.tables]
            for table in self._tables:
                self._gpu.drop_table(table)
            self._gpu.close()
        self._epoll.close()
        self._ends.close()

    # ---- the inside ----

    def _lose(self, peer: NvlinkPeer) -> None:
        log.info("a peer's process has ended; its memory is unmapped")
        self._unwatch(peer)
        peer.lose(ENDED)

    def _take_table(self) -> SpanTable:
        if self._tables:
            return self._tables.pop()
        assert self._gpu is not None, "a peer is connected"
        return self._gpu.make_table(PART_SPANS)

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the nvlink transport is closed")


def _sound(batch: ReadBatch) -> ReadBatch:
    """The batch in contiguous int64 arrays."""
    size = batch.length.size
    arrays = (batch.memory, batch.remote, batch.local, batch.length)
    if any(array.size != size for array in arrays):
        raise TransportError("a batch that is none: its four arrays differ in length")
    return ReadBatch(*(np.ascontiguousarray(array, dtype=np.int64) for array in arrays))
