"""A rank of a worker other than 0: its share of the model, its pages and its reads, all as rank 0 says.

Its first thread takes part in every step, a second owns transport and reads, a third reads the link to rank 0.
"""

import logging
import os
import queue
import select
import threading
from collections import deque
from typing import Protocol, TypeVar

import msgspec

from pdkv.agent.rank_digests import DigestPages, RankDigests
from pdkv.agent.rank_reads import CloseLink, ConnectLink, ProbeLink, RankOrder, RankReads, ReadPages
from pdkv.daemons.link import BlockingLink, WorkerSettings
from pdkv.daemons.rank_link import (
    ArenaWanted,
    RankBeat,
    RankBeatQuery,
    RankFatal,
    RankReady,
    RankSetup,
    ShareLoaded,
    StepEnded,
    StepRuns,
    ToRank,
)
from pdkv.daemons.rank_share import RankShare, furnish, load_share
from pdkv.errors import PdkvError
from pdkv.m3.parallel import Group
from pdkv.m3.step import StepRunner
from pdkv.memory.page_digests import ArenaDigests
from pdkv.transport.base import Transport

_LOG = logging.getLogger("pdkv.rank")
_LONGEST_SLEEP_MS = 5000

Message = TypeVar("Message", RankSetup, ArenaWanted)


class RankSurroundings(Protocol):
    """What differs between a rank that is a process and one that is a thread."""

    def join(self, setup: RankSetup) -> Group:
        """This rank's place in the worker's group."""
        ...

    def make_transport(self, settings: WorkerSettings) -> Transport: ...

    def orphaned(self) -> None:
        """Rank 0 is gone. Called from the thread that reads the link, whatever the others are at."""
        ...


class RankSide:
    """One rank for as long as rank 0 lives. ``serve`` is called once, by the thread that is to compute."""

    def __init__(self, link: BlockingLink, surroundings: RankSurroundings) -> None:
        self._link = link
        self._surroundings = surroundings
        self._decoder = msgspec.msgpack.Decoder(ToRank)
        self._steps: queue.SimpleQueue[StepRuns | None] = queue.SimpleQueue()
        """None: rank 0 is gone."""
        self._reader: threading.Thread | None = None
        self._ending = threading.Event()

    def serve(self) -> int:
        """Do as rank 0 says until it is gone; returns what a process is to exit with. Tells rank 0 why it cannot."""
        try:
            self._serve()
        except PdkvError as exc:
            self._link.send(RankFatal(str(exc), exc.exit_code))
            return exc.exit_code
        except Exception as exc:  # noqa: BLE001 - the outermost frame: rank 0 must learn why this rank went
            _LOG.exception("rank died")
            self._link.send(RankFatal(f"{type(exc).__name__}: {exc}", 1))
            return 1
        finally:
            self._ending.set()
            self._link.end()
            if self._reader is not None:
                self._reader.join()
            self._link.release()
        return 0

    def _serve(self) -> None:
        setup = self._expect(RankSetup)
        if setup is None:
            return
        share = load_share(setup.settings, self._surroundings.join(setup))
        self._link.send(ShareLoaded())
        wanted = self._expect(ArenaWanted)
        if wanted is None:
            return
        transport = self._surroundings.make_transport(setup.settings)
        thread = _ReadsThread(transport, self._link)
        try:
            self._work(setup, share, wanted, thread)
        finally:
            thread.stop()

    def _work(self, setup: RankSetup, share: RankShare, wanted: ArenaWanted, thread: "_ReadsThread") -> None:
        memory = furnish(setup.settings, share.layout, thread.transport, wanted.order)
        bases = (memory.arena.memory.address,)
        thread.start(RankReads(thread.transport, memory.offer.manifest, memory.probe, bases))
        self._link.send(RankReady(memory.offer))
        digests = RankDigests(memory.offer.manifest, ArenaDigests(memory.arena), self._link.send)
        self._reader = threading.Thread(target=self._read, args=(thread, digests), name="pdkv-rank-0-link", daemon=True)
        self._reader.start()
        runner = StepRunner(share.model, memory.arena)
        try:
            while (step := self._steps.get()) is not None:
                runner.run(step.runs)
                self._link.send(StepEnded())
        finally:
            digests.close()
        memory.stop_touching()

    def _expect(self, kind: type[Message]) -> Message | None:
        """The next message, before the link has a thread of its own; None when rank 0 is gone."""
        while (body := self._link.receive_bytes()) is not None:
            message = self._decoder.decode(body)
            if isinstance(message, RankBeatQuery):  # not answered: this rank's agent thread does not run yet
                continue
            assert isinstance(message, kind), f"{type(message).__name__} where {kind.__name__} was to come"
            return message
        return None

    def _read(self, thread: "_ReadsThread", digests: RankDigests) -> None:
        while (body := self._link.receive_bytes()) is not None:
            match self._decoder.decode(body):
                case StepRuns() as step:
                    self._steps.put(step)
                case (ConnectLink() | ProbeLink() | ReadPages() | CloseLink() | RankBeatQuery()) as message:
                    thread.post(message)
                case DigestPages() as order:
                    digests.obey(order)
                case message:
                    raise AssertionError(f"{type(message).__name__} comes once, at the start")
        self._steps.put(None)
        if not self._ending.is_set():
            self._surroundings.orphaned()


class _ReadsThread:
    """Owns a rank's transport and its reads, in a thread of their own, so that reads go on during a step.

    ``post`` may be called from any thread.
    """

    def __init__(self, transport: Transport, link: BlockingLink) -> None:
        self.transport = transport
        self._link = link
        self._posted: deque[RankOrder | RankBeatQuery] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, reads: RankReads) -> None:
        self._thread = threading.Thread(target=self._run, args=(reads,), name="pdkv-rank-reads", daemon=True)
        self._thread.start()

    def post(self, message: RankOrder | RankBeatQuery) -> None:
        self._posted.append(message)
        os.eventfd_write(self._wake, 1)

    def stop(self) -> None:
        """End the thread and close the transport."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        if self._thread is not None:
            self._thread.join()
        self.transport.close()

    def _run(self, reads: RankReads) -> None:
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        poller.register(self.transport.fileno(), select.POLLIN)
        try:
            while not self._stopping.is_set():
                if any(fd == self._wake for fd, _ in poller.poll(_LONGEST_SLEEP_MS)):
                    os.eventfd_read(self._wake)
                self._turn(reads)
        except Exception as exc:  # noqa: BLE001 - the outermost frame of this thread: nothing above could report it
            _LOG.exception("a rank's reads died")
            self._link.send(RankFatal(f"its reads died: {type(exc).__name__}: {exc}", 1))
            self._link.end()

    def _turn(self, reads: RankReads) -> None:
        while self._posted:
            message = self._posted.popleft()
            if isinstance(message, RankBeatQuery):
                self._link.send(RankBeat())
                continue
            for report in reads.obey(message):
                self._link.send(report)
        for report in reads.on_completions(self.transport.poll()):
            self._link.send(report)
