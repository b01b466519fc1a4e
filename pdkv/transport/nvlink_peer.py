"""One peer of an nvlink transport: its mapped memory, its streams, and a thread that sleeps until reads have ended."""

import logging
import threading
from collections.abc import Callable
from queue import SimpleQueue

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import MemoryDescriptor
from pdkv.transport.base import Completion, ReadId, ReadStatus
from pdkv.transport.gpu import Exported, Gpu, SpanTable
from pdkv.transport.nvlink_spans import SpanBounds
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
    tables: tuple[SpanTable, ...]
    """Free again when the events have happened."""
    error: str
    """Why it failed already; what was put on the streams before that is waited for all the same."""


class NvlinkPeer:
    """Belongs to the transport's thread, but for ``_watch``, which is the thread that it starts.

    ``life`` and the mapping are closed by that thread when all work has ended: nothing is unmapped under a copy.
    """

    def __init__(
        self, gpu: Gpu, life: Life, memories: tuple[MemoryDescriptor, ...], finish: Callable[[Completion, Work], None]
    ) -> None:
        self.life = life
        self.memories = memories
        self.broken = ""
        """Why nothing can be read any more; empty as long as it can."""
        self.has_carried = False
        self.mapping = Mapping((), ())
        self.bounds: SpanBounds | None = None
        """None until the first read, and when what is registered here has changed."""
        self._gpu = gpu
        self._finish = finish
        self._streams: list[int] = []
        self._turn = 0
        self._work: SimpleQueue[Work | None] = SimpleQueue()
        self._closed = False
        self._thread: threading.Thread | None = None

    def open(self, keys: list[Exported], name: str) -> None:
        """Map and start. Raises ``TransportError`` when CUDA or the system refuses."""
        self.mapping = map_all(self._gpu, keys)
        try:
            for _ in range(NUM_STREAMS):
                self._streams.append(self._gpu.make_stream())
            thread = threading.Thread(target=self._watch, name=name, daemon=True)
            thread.start()
        except (TransportError, RuntimeError) as error:  # threads raise RuntimeError
            self._drop()
            raise TransportError(f"no room for another peer: {error}") from error
        self._thread = thread

    def next_stream(self) -> int:
        """Where the next part of a batch goes."""
        self._turn += 1
        return self._streams[self._turn % len(self._streams)]

    def add(self, work: Work) -> None:
        self._work.put(work)

    def lose(self, why: str) -> None:
        """Nothing more is read; what is under way ends, and the memory is unmapped: as long as it is mapped, the GPU
        keeps it for a process that is no more."""
        if not self.broken:
            self.broken = why
            self._work.put(None)

    def close(self) -> None:
        """What is under way ends as cancelled."""
        self._closed = True
        self.lose("it is closed")

    def is_gone(self) -> bool:
        """Whether nothing is under way or mapped any more, after ``close``."""
        if self._thread is not None and self._thread.is_alive():
            return False
        self.life.close()
        return True

    def join(self) -> None:
        """Wait until nothing is under way or mapped. After ``close`` or ``lose``."""
        if self._thread is not None:
            self._thread.join()
        self.life.close()

    # ---- the peer's thread ----

    def _watch(self) -> None:
        while (work := self._work.get()) is not None:
            error = work.error
            for event in work.events:
                try:
                    self._gpu.wait(event)
                except TransportError as refusal:
                    error = error or str(refusal)
            self._finish(self._end_of(work.read, error), work)
        self._drop()

    def _end_of(self, read: ReadId, error: str) -> Completion:
        if self._closed:
            return Completion(read, ReadStatus.CANCELLED, "the peer was closed")
        # Asked after the copies: a peer that lives now has kept its memory all the while.
        if not error and self.life.has_ended:
            error = ENDED
        if error:
            return Completion(read, ReadStatus.FAILED, error)
        self.has_carried = True
        return Completion(read, ReadStatus.OK)

    def _drop(self) -> None:
        for drop, handle in (
            *((self._gpu.drop_stream, stream) for stream in self._streams),
            *((self._gpu.unmap, address) for address in self.mapping.opened),
        ):
            try:
                drop(handle)
            except TransportError as error:
                log.warning(f"a peer's memory or stream is not given back: {error}")
