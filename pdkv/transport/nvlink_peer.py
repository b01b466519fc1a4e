"""One peer of an nvlink transport: its mapped memory, its streams, and and what waits until reads have ended."""

import logging
import threading

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, MemoryDescriptor
from pdkv.transport.base import Completion, ReadId, ReadStatus
from pdkv.transport.gpu import Exported, Gpu, SpanTable
from pdkv.transport.nvlink_spans import Driver, Ends, Posting, Watch
from pdkv.transport.process_life import Life

log = logging.getLogger("pdkv.transport.nvlink")

ENDED = "the peer's process has ended"

NUM_STREAMS = 2
"""Parts of a batch take turns: while one's table travels, or its last warps end, the other's bytes fill the link."""


class Mapping(msgspec.Struct, frozen=True):
    """A peer's memories where this GPU reads them."""

    bases: tuple[int, ...]
    """Address of each memory."""
    opened: tuple[int, ...]
    """Addresses to unmap, one an allocation."""


def map_all(gpu: Gpu, keys: list[Exported]) -> Mapping:
    """Map every allocation once. Raises ``TransportError`` and leaves nothing mapped."""
    opened: dict[bytes, int] = {}
    try:
        for key in keys:
            if key.handle not in opened:
                opened[key.handle] = gpu.map(key.handle)
    except TransportError:
        for address in opened.values():
            gpu.unmap(address)
        raise
    return Mapping(tuple(opened[key.handle] + key.offset for key in keys), tuple(opened.values()))


class Work(msgspec.Struct, frozen=True, eq=False):
    """A read whose copies are on the streams."""

    read: ReadId
    events: tuple[int, ...]
    """Free again when they have happened, as are the tables."""
    tables: tuple[SpanTable, ...]
    error: str
    """Why it failed already; what was put on the streams before that is waited for all the same."""
    num_bytes: int = 0
    begun_ns: int = 0
    """By the monotonic clock."""


class NvlinkPeer:
    """Belongs to the transport's thread, but for ``_end``, which runs in one of its own: it waits for the thread of
    native code that waits for reads, and then unmaps. Nothing is unmapped under a copy.
    """

    def __init__(
        self, gpu: Gpu, driver: Driver, life: Life, memories: tuple[MemoryDescriptor, ...], ends: Ends
    ) -> None:
        """``ends``: gets the reads that have ended."""
        self.life = life
        self.memories = memories
        self.broken = ""
        """Why nothing can be read any more; empty as long as it can."""
        self.is_closed = False
        self.has_carried = False
        self.driver = driver
        self.mapping = Mapping((), ())
        self.streams: tuple[int, ...] = ()
        self.posting: Posting | None = None
        """None until the first read, and when what is registered here has changed."""
        self._gpu = gpu
        self._ends = ends
        self._events: list[int] = []
        self._unused: list[int] = []
        """Of them, those that no read has."""
        self._watch: Watch | None = None
        self._ending: threading.Thread | None = None

    def open(self, keys: list[Exported]) -> None:
        """Map and start. Raises ``TransportError`` when CUDA or the system refuses."""
        self.mapping = map_all(self._gpu, keys)
        try:
            for _ in range(NUM_STREAMS):
                self.streams += (self._gpu.make_stream(),)
            for _ in range(2 * NUM_STREAMS):
                self._unused.append(self._make_event())
            self._watch = Watch(self.driver, self._ends)
        except (TransportError, OSError) as error:
            self._drop()
            raise TransportError(f"no room for another peer: {error}") from error

    def bases(self) -> Int64Array:
        """Address of each memory; one that is none, where there is no memory."""
        return np.array(self.mapping.bases or (0,), dtype=np.int64)

    def why(self, code: int, call: str) -> str:
        """What the driver meant by refusing a call."""
        return self._gpu.why(code, call)

    def take_event(self) -> int:
        """One that nothing uses; it comes back with the work that it is of."""
        return self._unused.pop() if self._unused else self._make_event()

    def _make_event(self) -> int:
        event = self._gpu.make_event()
        self._events.append(event)
        return event

    def add(self, work: Work) -> None:
        """To be told of when it has ended. Not after ``lose``."""
        if work.events:
            assert self._watch is not None, "it is open"
            self._watch.add(work.read, work.events, work.num_bytes, bool(work.tables), work.begun_ns)
        else:
            self._ends.add(work.read)

    def end_of(self, work: Work, code: int) -> Completion:
        """Of a read that has ended; ``code``: the driver's result."""
        self._unused += work.events
        if self.is_closed:
            return Completion(work.read, ReadStatus.CANCELLED, "the peer was closed")
        error = work.error or (self.why(code, "cuEventSynchronize") if code else "")
        # Asked after the copies: a peer that lives now has kept its memory all the while.
        if not error and self.life.has_ended:
            error = ENDED
        if error:
            return Completion(work.read, ReadStatus.FAILED, error)
        self.has_carried = True
        return Completion(work.read, ReadStatus.OK)

    def lose(self, why: str) -> None:
        """Nothing more is read; what is under way ends, and the memory is unmapped: as long as it is mapped, the GPU
        keeps it for a process that is no more."""
        if self.broken:
            return
        self.broken = why
        if self._watch is not None:
            self._watch.stop()
            self._ending = threading.Thread(target=self._end, args=(self._watch,), name="pdkv-nvlink-end", daemon=True)
            self._ending.start()

    def close(self) -> None:
        """What is under way ends as cancelled."""
        self.is_closed = True
        self.lose("it is closed")

    def is_gone(self) -> bool:
        """Whether nothing is under way or mapped any more, after ``close``."""
        if self._ending is not None and self._ending.is_alive():
            return False
        self.life.close()
        return True

    def join(self) -> None:
        """Wait until nothing is under way or mapped. After ``close`` or ``lose``."""
        if self._ending is not None:
            self._ending.join()
        self.life.close()

    # ---- the ending thread ----

    def _end(self, watch: Watch) -> None:
        watch.join()
        self._drop()

    def _drop(self) -> None:
        for drop, handle in (
            *((self._gpu.drop_stream, stream) for stream in self.streams),
            *((self._gpu.drop_event, event) for event in self._events),
            *((self._gpu.unmap, address) for address in self.mapping.opened),
        ):
            try:
                drop(handle)
            except TransportError as error:
                log.warning(f"a peer's memory, stream or event is not given back: {error}")
