"""Several transports behind one: each peer is read by the best way that works for it.

Every memory is registered with all ways, and the address carries all of them. A peer is tried by its best way first; a
way that fails before it has carried a byte is given up for the next, and what was asked of it is asked again; so is one
that crawls while others are left. Once a way has carried a read otherwise, it stays: its failures are the peer's.
"""

import logging
import os
import select
from collections.abc import Sequence

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.ranges import fault_of, int64_copy
from pdkv.transport.sealed import seal, unseal

log = logging.getLogger("pdkv.transport.auto")

_MAGIC = b"pdkvaut1"

_BEST_FIRST = ("cuda_ipc", "shm", "rdma", "tcp")
"""Paths as they are tried. A mapping comes before a network card: it asks nothing of the peer."""


class Way(msgspec.Struct, frozen=True):
    """One transport of several, and the best path that it can end on from this host."""

    transport: Transport
    reach: str


class _Part(msgspec.Struct, frozen=True):
    """What one way of a worker tells its peers."""

    reach: str
    address: TransportAddress


class _Peer:
    """A peer, the ways left to it, and the way it is read by now (None = all have failed)."""

    def __init__(self, memories: tuple[MemoryDescriptor, ...], ways: list[tuple[Transport, TransportAddress]]) -> None:
        self.memories = memories
        self.left = ways
        self.way: Transport | None = None
        self.address: TransportAddress | None = None
        self.inner = PeerId(-1)
        self.proven = False
        self.why: list[str] = []

    @property
    def reasons(self) -> str:
        return "; ".join(self.why) or "no way is common to both"


class _Read(msgspec.Struct, eq=False):
    """A batch under way. ``batch`` is kept only while its peer's way is not proven."""

    id: ReadId
    peer: PeerId
    inner: PeerId
    batch: ReadBatch | None


class AutoTransport(Transport):
    """See ``Transport``. Owns its ways: they are closed with it, and nobody else calls them.

    ``ways``: those of equal reach are tried in the order given. A way that cannot register a memory is closed and left
    out, with a log line that says why; ``TransportError`` when none is left.
    """

    name = "auto"

    def __init__(self, ways: Sequence[Way]) -> None:
        if not ways:
            raise TransportError("auto needs at least one transport")
        self.ways = list(ways)
        self._memories: list[LocalMemory] = []
        self._descriptors: list[MemoryDescriptor] = []
        self._peers: dict[PeerId, _Peer] = {}
        self._reads: dict[tuple[str, ReadId], _Read] = {}
        self._refused: list[Completion] = []
        self._next_peer = 0
        self._next_read = 0
        self._closed = False
        self._refusals = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._epoll = select.epoll()
        self._epoll.register(self._refusals, select.EPOLLIN)
        for way in self.ways:
            self._epoll.register(way.transport.fileno(), select.EPOLLIN)

    # ---- this side ----

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        self._check_open()
        refusals = []
        for way in list(self.ways):
            try:
                way.transport.register(memory)
            except TransportError as error:
                refusals.append(str(error))
                self._leave_out(way, str(error))
        if not self.ways:
            raise TransportError(f"no transport can register {memory.length} bytes: {'; '.join(refusals)}")
        descriptor = MemoryDescriptor(address=memory.address, length=memory.length, key=b"")
        self._memories.append(memory)
        self._descriptors.append(descriptor)
        return descriptor

    def address(self) -> TransportAddress:
        parts = [_Part(way.reach, way.transport.address()) for way in self.ways]
        return TransportAddress(self.name, seal(_MAGIC, msgspec.msgpack.encode(parts)), tuple(self._descriptors))

    def _leave_out(self, way: Way, why: str) -> None:
        log.info(f"not reading or serving by {way.transport.name}: {why}")
        self.ways.remove(way)
        self._epoll.unregister(way.transport.fileno())
        way.transport.close()

    # ---- peers ----

    def connect(self, address: TransportAddress) -> PeerId:
        self._check_open()
        peer = _Peer(address.memories, self._ways_to(_parts(address)))
        self._take_next_way(peer)
        if peer.way is None:
            raise TransportError(f"no way to the peer: {peer.reasons}")
        number = PeerId(self._next_peer)
        self._next_peer += 1
        self._peers[number] = peer
        return number

    def close_peer(self, peer: PeerId) -> None:
        known = self._peers.pop(peer, None)
        if known is not None and known.way is not None:
            known.way.close_peer(known.inner)

    def path(self, peer: PeerId) -> str:
        known = self._peers.get(peer)
        return known.way.path(known.inner) if known is not None and known.way is not None else "unknown"

    def note(self, peer: PeerId) -> str:
        known = self._peers.get(peer)
        return known.way.note(known.inner) if known is not None and known.way is not None else ""

    def crawls(self, peer: PeerId) -> bool:
        known = self._peers.get(peer)
        return known is not None and known.way is not None and known.way.crawls(known.inner)

    def _ways_to(self, parts: Sequence[_Part]) -> list[tuple[Transport, TransportAddress]]:
        """Those that both sides have, by the worse of what the two can reach."""
        theirs = {part.address.transport: part for part in parts}
        common = [(way, theirs[way.transport.name]) for way in self.ways if way.transport.name in theirs]
        common.sort(key=lambda pair: max(_rank(pair[0].reach), _rank(pair[1].reach)))
        return [(way.transport, part.address) for way, part in common]

    def _take_next_way(self, peer: _Peer) -> None:
        peer.way = None
        while peer.way is None and peer.left:
            way, address = peer.left.pop(0)
            try:
                peer.inner = way.connect(address)
                peer.way, peer.address = way, address
            except TransportError as error:
                peer.why.append(f"{way.name}: {error}")

    # ---- reads ----

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        self._check_open()
        if len({batch.memory.size, batch.remote.size, batch.local.size, batch.length.size}) != 1:
            raise TransportError("a batch that is none: its four arrays differ in length")
        number = ReadId(self._next_read)
        self._next_read += 1
        known = self._peers.get(peer)
        if known is None:
            self._refuse(number, ReadStatus.FAILED, f"peer {peer} is closed")
        elif known.proven:
            self._ask(_Read(number, peer, known.inner, None), known, batch)
        else:
            batch = int64_copy(batch)  # the caller may change its arrays, and the next way is to read the same
            fault = fault_of(batch, known.memories, self._memories)
            if fault:  # of the batch, not of the way
                self._refuse(number, ReadStatus.FAILED, fault)
            else:
                self._ask(_Read(number, peer, known.inner, batch), known, batch)
        return number

    def poll(self) -> list[Completion]:
        if self._closed:
            return []
        done: list[Completion] = []
        for way in self.ways:
            for completion in way.transport.poll():
                read = self._reads.pop((way.transport.name, completion.read))
                if not self._ask_again(way.transport, read, completion):
                    done.append(msgspec.structs.replace(completion, read=read.id))
        if self._refused:
            done += self._refused
            self._refused = []
            os.eventfd_read(self._refusals)
        return done

    def _ask(self, read: _Read, peer: _Peer, batch: ReadBatch) -> None:
        if peer.way is None:
            self._refuse(read.id, ReadStatus.FAILED, peer.reasons)
            return
        read.inner = peer.inner
        self._reads[peer.way.name, peer.way.submit(peer.inner, batch)] = read

    def _ask_again(self, way: Transport, read: _Read, completion: Completion) -> bool:
        """Whether a read that ended badly, or well by a way that crawls, goes by another. Else a read that ended well
        proves its way."""
        peer = self._peers.get(read.peer)
        current = peer is not None and peer.way is way and peer.inner == read.inner
        if completion.status is ReadStatus.OK:
            carried = read.batch is not None and read.batch.num_spans > 0  # an empty batch says nothing of its way
            if peer is None or not current or not carried or peer.proven:
                return False
            if not peer.left or not way.crawls(peer.inner):
                self._prove(read.peer, peer)
                return False
        if peer is None or read.batch is None or (current and peer.proven):
            return False
        if current:
            self._leave_way(read.peer, peer, way, completion)
        self._ask(read, peer, read.batch)
        return True

    def _leave_way(self, number: PeerId, peer: _Peer, way: Transport, completion: Completion) -> None:
        """A way that failed is not taken again; one that crawls is better than none, when all others have failed."""
        crawled = completion.status is ReadStatus.OK
        told = f"it would crawl: {way.note(peer.inner)}" if crawled else completion.error
        if crawled and peer.address is not None:
            peer.left.append((way, peer.address))
        way.close_peer(peer.inner)
        peer.why.append(f"{way.name}: {told}")
        self._take_next_way(peer)
        taken = peer.way.name if peer.way is not None else "nothing else"
        log.warning(f"peer {number} cannot be read by {way.name}, trying {taken}: {told}")

    def _prove(self, number: PeerId, peer: _Peer) -> None:
        peer.proven = True
        assert peer.way is not None, "a read came by it"
        because = f" ({peer.reasons})" if peer.why else ""
        note = peer.way.note(peer.inner)
        how = f"{peer.way.path(peer.inner)}, {note}" if note else peer.way.path(peer.inner)
        if peer.way.crawls(peer.inner):
            log.warning(f"peer {number} is read by {peer.way.name} and nothing better: reads will crawl")
        log.info(f"peer {number} is read by {peer.way.name} over {how}{because}")

    def _refuse(self, read: ReadId, status: ReadStatus, why: str) -> None:
        self._refused.append(Completion(read, status, why))
        os.eventfd_write(self._refusals, 1)

    def fileno(self) -> int:
        return self._epoll.fileno()

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._epoll.close()
        for way in self.ways:
            way.transport.close()
        os.close(self._refusals)
        self._peers.clear()
        self._reads.clear()

    def _check_open(self) -> None:
        if self._closed:
            raise TransportError("the auto transport is closed")


def _parts(address: TransportAddress) -> list[_Part]:
    """A peer that has one transport only is one part, of which nothing better than TCP is known."""
    if address.transport != AutoTransport.name:
        return [_Part("tcp", address)]
    try:
        parts = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=list[_Part])
    except msgspec.MsgspecError as error:
        raise TransportError(f"the peer's address says nothing that this version knows: {error}") from error
    lengths = [memory.length for memory in address.memories]
    if any([memory.length for memory in part.address.memories] != lengths for part in parts):
        raise TransportError("the peer describes its memories differently for different transports")
    return parts


def _rank(reach: str) -> int:
    return _BEST_FIRST.index(reach) if reach in _BEST_FIRST else len(_BEST_FIRST)
