"""The other ranks of a worker as its rank 0 sees them: tells them what to do, gathers answers, notices who is gone."""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from pdkv.agent.rank_digests import DigestPages, PagesDigested
from pdkv.agent.rank_reads import LinkConnected, LinkProbed, PagesRead, RankOrder, RankReport
from pdkv.daemons.link import BlockingLink, encode_frame
from pdkv.daemons.rank_link import (
    FromRank,
    RankAnswer,
    RankBeat,
    RankBeatQuery,
    RankFatal,
    RankReady,
    ShareLoaded,
    StepEnded,
    ToRank,
)
from pdkv.errors import RankLostError
from pdkv.m3.parallel import SOLO, Group

_SETTLE_S = 0.2
"""A rank that dies takes others with it, in any order: so long their ends are collected before one is blamed."""
_END_S = 3.0
_GRACE_S = 3.0
_BLAME_S = 2.0
"""Less than the grace: whoever waits for the blame is not stuck."""
_BEAT_EVERY_S = 1.0

Answer = TypeVar("Answer", ShareLoaded, RankReady, StepEnded)
OnReport = Callable[[int, RankReport | PagesDigested], None]
OnLost = Callable[[RankLostError], None]


class RankEnd(msgspec.Struct, frozen=True):
    """How a rank ended, in words that follow "rank 2 ...". ``by_force``: it had no chance to say why."""

    told: str
    by_force: bool


class Member(Protocol):
    """One other rank, a process or a thread."""

    @property
    def link(self) -> BlockingLink: ...

    def ended(self) -> RankEnd:
        """How it ended; asked once its link has ended. May wait a moment for the rank itself."""
        ...


class Meeting(Protocol):
    """How the ranks of one worker come to share a group for their collectives. Rank 0's end of it."""

    def open(self) -> int:
        """The port that the other ranks are told."""
        ...

    def join(self, device: str) -> Group:
        """Wait for all the others. Raises ``RankLostError`` when one does not come."""
        ...


class _Alone:
    def open(self) -> int:
        return 0

    def join(self, _device: str) -> Group:
        return SOLO


class OtherRanks:
    """Ranks 1 to n - 1 of a worker; ``members[i]`` is rank i + 1. Made before the worker's threads, started by
    ``listen``, which makes one thread a rank that does nothing but read its link.

    ``gather`` and ``tell_each`` belong to the engine thread; ``tell``, ``beat_age_s`` and what ``carriers`` returns may
    be called from any.
    """

    def __init__(
        self,
        members: Sequence[Member] = (),
        meeting: Meeting | None = None,
        at_worst: OnLost = lambda _error: None,
    ) -> None:
        """``at_worst`` is called when a rank was lost and nobody has called ``close`` some seconds later: the engine
        thread then waits for something that will never come, for instance in a collective."""
        self.meeting = meeting or _Alone()
        self._at_worst = at_worst
        self._members = tuple(members)
        self._answers: tuple[queue.SimpleQueue[RankAnswer | None], ...] = tuple(queue.SimpleQueue() for _ in members)
        self._on_report: OnReport | None = None
        self._on_lost: OnLost | None = None
        self._fatals: dict[int, RankFatal] = {}
        self._heard_at = [time.monotonic()] * len(self._members)
        self._losses: list[tuple[int, RankEnd]] = []
        """In the order in which they were noticed. Guarded by ``_lock``, as is the start of the blaming."""
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._closing = threading.Event()
        self._blamed = threading.Event()
        self._error: RankLostError | None = None

    @property
    def size(self) -> int:
        """Of the whole worker, rank 0 included."""
        return 1 + len(self._members)

    def listen(self, on_report: OnReport, on_lost: OnLost) -> None:
        """Begin to read. ``on_report`` gets what ranks tell rank 0's agent, ``on_lost`` the first rank's end that was
        not asked for, once; both are called from threads of this object and must only queue, or end the process."""
        self._on_report, self._on_lost = on_report, on_lost
        for index, member in enumerate(self._members):
            name = f"pdkv-rank-{index + 1}-link"
            self._threads.append(threading.Thread(target=self._read, args=(index, member), name=name, daemon=True))
        if self._members:
            self._threads.append(threading.Thread(target=self._beat, name="pdkv-rank-beats", daemon=True))
        for thread in self._threads:
            thread.start()

    def tell(self, message: ToRank) -> None:
        """Send every rank the same message."""
        if self._members:
            frame = encode_frame(message)
            for member in self._members:
                member.link.send_frame(frame)

    def tell_each(self, message: Callable[[int], ToRank]) -> None:
        """Send each rank what ``message`` makes for its number."""
        for index, member in enumerate(self._members):
            member.link.send(message(index + 1))

    def carriers(self) -> list[Callable[[RankOrder | DigestPages], None]]:
        """For each rank, in order, what carries an order to it."""
        return [member.link.send for member in self._members]

    def gather(self, kind: type[Answer]) -> list[Answer]:
        """One answer of every rank, in order; waits for them. Raises ``RankLostError`` when one is gone."""
        found: list[Answer] = []
        for answers in self._answers:
            answer = answers.get()
            if answer is None:
                raise self.loss() or RankLostError("the ranks of this worker are ending")
            assert isinstance(answer, kind), f"{type(answer).__name__} where {kind.__name__} was to come"
            found.append(answer)
        return found

    def loss(self) -> RankLostError | None:
        """Which rank was lost, and how, after a failed collective; None when none is within a few seconds."""
        self._blamed.wait(_BLAME_S)
        return self._error

    def beat_age_s(self) -> float:
        """Seconds since the rank that has been silent longest was heard; each is asked every second."""
        return time.monotonic() - min(self._heard_at) if self._heard_at else 0.0

    def close(self) -> None:
        """Let all ranks end, and wait until they have, within reason; that is no loss any more. Idempotent."""
        self._closing.set()
        for member in self._members:
            member.link.end()
        for thread in self._threads:
            thread.join(_END_S)

    def _read(self, index: int, member: Member) -> None:
        try:
            self._hear_all(index, member)
        finally:  # also when it says something that cannot be understood: nobody would listen to it any more
            member.link.end()
            end = member.ended()
            if not self._closing.is_set():
                self._on_end(index, end)
            member.link.release()

    def _hear_all(self, index: int, member: Member) -> None:
        decoder = msgspec.msgpack.Decoder(FromRank)
        while (body := member.link.receive_bytes()) is not None:
            self._heard_at[index] = time.monotonic()
            match decoder.decode(body):
                case (LinkConnected() | LinkProbed() | PagesRead() | PagesDigested()) as report:
                    assert self._on_report is not None, "listen() comes first"
                    self._on_report(index + 1, report)
                case RankFatal() as fatal:
                    self._fatals[index] = fatal
                case RankBeat():
                    pass
                case answer:
                    self._answers[index].put(answer)

    def _beat(self) -> None:
        while not self._closing.wait(_BEAT_EVERY_S):
            self.tell(RankBeatQuery())

    def _on_end(self, index: int, end: RankEnd) -> None:
        with self._lock:
            self._losses.append((index, end))
            first = len(self._losses) == 1
        if not first:
            return
        self._closing.wait(_SETTLE_S)
        self._error = self._blame()
        self._blamed.set()
        for answers in self._answers:
            answers.put(None)
        assert self._on_lost is not None, "listen() comes first"
        self._on_lost(self._error)
        if not self._closing.wait(_GRACE_S):
            self._at_worst(self._error)

    def _blame(self) -> RankLostError:
        """The rank that was killed; else the first to say why it ends, for the others' collectives fail after it."""
        with self._lock:
            losses = list(self._losses)
        index, end = next(((i, end) for i, end in losses if end.by_force and i not in self._fatals), losses[0])
        fatal = self._fatals.get(index)
        told = f"failed: {fatal.message}" if fatal else end.told
        error = RankLostError(f"rank {index + 1} of this worker's {self.size} {told}")
        if fatal is not None:
            error.exit_code = fatal.exit_code
        return error
