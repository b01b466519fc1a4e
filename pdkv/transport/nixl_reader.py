"""Reads of one peer over NIXL: an agent and a thread of their own, so that the end of both is the end of the reads."""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Sequence

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import Int64Array, LocalMemory
from pdkv.transport.base import Completion, ReadId, ReadStatus
from pdkv.transport.nixl_agent import NixlAgent, NixlPackage, NixlSide
from pdkv.transport.nixl_path import ChosenPath
from pdkv.transport.process_life import Life
from pdkv.transport.ucx import path_of

_PARTS_IN_FLIGHT = 2
"""One lands while the next is handed over."""

_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 20e-6, 1e-3
"""Between two looks at what is under way. NIXL has nothing to sleep on; bytes move meanwhile, on its own thread."""


class CompletionBox:
    """Completions of a transport's reads, put in by readers' threads and taken by the transport's owner."""

    def __init__(self) -> None:
        self.fileno = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._lock = threading.Lock()
        self._held: list[Completion] = []

    def put(self, *completions: Completion) -> None:
        with self._lock:
            self._held += completions
            if self._held:
                os.eventfd_write(self.fileno, 1)

    def take(self) -> list[Completion]:
        with self._lock:
            held, self._held = self._held, []
            if held:
                os.eventfd_read(self.fileno)
        return held

    def close(self) -> None:
        """Only when no reader is left."""
        os.close(self.fileno)


class NixlFarEnd(msgspec.Struct, frozen=True):
    """The peer of a ``NixlReader``."""

    metadata: bytes
    life: Life | None
    """Its process, where it can be seen from here; the reader's from here on."""


class NixlNearEnd(msgspec.Struct, frozen=True):
    """What a ``NixlReader`` reads with. Shared by all readers of a transport."""

    package: NixlPackage
    memories: Sequence[LocalMemory]
    """Registered by the transport, which only ever appends: destinations of reads."""
    gpu: int
    settings: dict[str, str]
    keepalive_ms: int
    window_spans: int
    window_bytes: int
    drain_s: float


class NixlRead(msgspec.Struct, eq=False):
    """A batch that is or will be under way. Owned by its reader's thread once it has been submitted."""

    id: ReadId
    local: NixlSide
    remote: NixlSide
    ends: Int64Array
    """Bytes up to the end of each span."""
    posted: int = 0
    """Spans that have been handed over."""

    def next_part(self, spans: int, num_bytes: int) -> slice:
        """The spans to hand over next: at least one, and else no more than so many spans and bytes."""
        before = int(self.ends[self.posted - 1]) if self.posted else 0
        fit = int(np.searchsorted(self.ends, before + num_bytes, side="right"))
        end = min(max(fit, self.posted + 1), self.posted + spans, self.ends.size)
        return slice(self.posted, end)

    @property
    def is_posted(self) -> bool:
        return self.posted == self.ends.size


class _Part(msgspec.Struct, frozen=True):
    """Spans of a read under way, as one of NIXL's transfers."""

    read: NixlRead
    handle: int
    is_last: bool
    has_ended: bool


class NixlReader:
    """The way to one peer, from its making to ``close``; its thread ends soon after that, or when the peer fails.

    ``submit``, ``close`` and ``join`` are the owner's; all of NIXL is the thread's. Every read is completed once, by
    the box. Completions other than OK come when the agent has been destroyed, which ends what NIXL cannot cancel.
    """

    def __init__(self, name: str, near: NixlNearEnd, far: NixlFarEnd, box: CompletionBox) -> None:
        self.path = "unknown"
        self.words = ""
        """What UCX calls the way, once a read has taken it."""
        self._name, self._near, self._far, self._box = name, near, far, box
        self._lock = threading.Lock()  # of the three below
        self._queue: deque[NixlRead] = deque()
        self._has_ended = False
        self._why = ""
        self._closing = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._parts: deque[_Part] = deque()
        self._current: NixlRead | None = None
        self._registered = 0
        self._pause_s = _SHORTEST_PAUSE_S
        self._chosen: ChosenPath | None = None
        self._thread = threading.Thread(target=self._run, name=f"pdkv-{name[-16:]}", daemon=True)
        self._thread.start()

    # ---- the owner's ----

    def submit(self, read: NixlRead) -> None:
        with self._lock:
            if not self._has_ended:
                self._queue.append(read)
                os.eventfd_write(self._wake, 1)
                return
        self._box.put(Completion(read.id, ReadStatus.FAILED, self._why))

    def close(self) -> None:
        """Ask for the end: reads under way have ``drain_s`` to arrive, which spares a live peer's UCX."""
        with self._lock:
            self._closing = True
            if not self._has_ended:
                os.eventfd_write(self._wake, 1)

    def join(self) -> None:
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    # ---- the thread's ----

    def _run(self) -> None:
        why = "the reading thread met an error of its own, which is in the log"
        agent: NixlAgent | None = None
        try:
            self._chosen = ChosenPath()
            settings = {**self._near.settings, **self._chosen.settings}
            if self._far.life is None:  # else its pidfd tells, and keepalives would fill a stopped peer's queues
                settings["KEEPALIVE_INTERVAL"] = f"{self._near.keepalive_ms}ms"
            agent = NixlAgent(self._near.package, self._name, settings, self._near.gpu)
            self._register(agent)
            peer = agent.meet(self._far.metadata)
            why = self._work(agent, peer)
        except TransportError as error:
            why = str(error)
        finally:
            self._end(agent, why)

    def _work(self, agent: NixlAgent, peer: str) -> str:
        """Until the peer is closed. Raises ``TransportError`` when it fails."""
        while not self._closing:
            self._post(agent, peer)
            if self._parts:
                self._look(agent)
            else:
                self._sleep()
        deadline = time.monotonic() + self._near.drain_s
        while self._parts and time.monotonic() < deadline:
            self._look(agent)
        return ""

    def _sleep(self) -> None:
        """Until there is something to do. A dead peer's memory may be mapped, and is to be let go of at once."""
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        if self._far.life is not None and self._far.life.fd >= 0:
            poll.register(self._far.life.fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll()]
        if self._wake in ready:
            os.eventfd_read(self._wake)
        self._check_life()

    def _post(self, agent: NixlAgent, peer: str) -> None:
        while len(self._parts) < _PARTS_IN_FLIGHT:
            read = self._current
            if read is None:
                with self._lock:
                    read = self._queue.popleft() if self._queue else None
                if read is None:
                    return
                self._current = read
                self._register(agent)
            if read.ends.size == 0:
                self._current = None
                self._box.put(Completion(read.id, ReadStatus.OK))
                continue
            part = read.next_part(self._near.window_spans, self._near.window_bytes)
            sides = (NixlSide(side.on_gpu, side.table[part]) for side in (read.local, read.remote))
            handle, has_ended = agent.post(peer, *sides)
            read.posted = part.stop
            self._parts.append(_Part(read, handle, read.is_posted, has_ended))
            if read.is_posted:
                self._current = None

    def _look(self, agent: NixlAgent) -> None:
        """At the oldest part; a pause if it is still under way."""
        part = self._parts[0]
        if not part.has_ended and not agent.has_ended(part.handle):
            self._check_life()
            time.sleep(self._pause_s)
            self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
            return
        self._pause_s = _SHORTEST_PAUSE_S
        agent.release(part.handle)
        if part.is_last:
            self._check_life()  # what is mapped could be read after its maker's death
            self._judge()
            self._box.put(Completion(part.read.id, ReadStatus.OK))
        self._parts.popleft()

    def _judge(self) -> None:
        """After the first read: which way it came."""
        if self._chosen is None:
            return
        self.words = self._chosen.read()
        self._chosen.close()
        self._chosen = None
        path = path_of(self.words)
        if path == "cuda_ipc" and self._far.life is None:
            raise TransportError("the peer's GPU memory is mapped, and its process cannot be watched from here")
        self.path = path

    def _check_life(self) -> None:
        if self._far.life is not None and self._far.life.has_ended:
            raise TransportError("the peer's process has ended")

    def _register(self, agent: NixlAgent) -> None:
        while self._registered < len(self._near.memories):
            agent.register(self._near.memories[self._registered])
            self._registered += 1

    def _end(self, agent: NixlAgent | None, why: str) -> None:
        """Destroy the agent, and only then say of all reads that are left how they ended."""
        if agent is not None:
            agent.close()
        if self._chosen is not None:
            self._chosen.close()
        if self._far.life is not None:
            self._far.life.close()
        with self._lock:
            self._has_ended = True
            self._why = why or "the peer is closed"
            left = {part.read.id: part.read for part in self._parts}
            left |= {read.id: read for read in (self._current, *self._queue) if read is not None}
            closing = self._closing
            os.close(self._wake)
        self._parts.clear()
        self._queue.clear()
        status = ReadStatus.CANCELLED if closing else ReadStatus.FAILED
        self._box.put(*(Completion(read, status, self._why) for read in left))
