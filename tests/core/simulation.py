"""A world in which one transfer happens: a network that loses, repeats and reorders, engines, one-sided reads, crashes.

Time is simulated; everything random comes from one seed. Pages of P carry an owner, so that a read of a page that was
reused meanwhile is seen, whatever the sessions believe.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pdkv.core.decode_session import DecodeSession, DecodeState
from pdkv.core.events import (
    ClosePeer,
    FreePages,
    LocalFailure,
    MessageArrived,
    Outcome,
    PagesReserved,
    PeerLost,
    PrefillEnded,
    Progressed,
    Read,
    ReadEnded,
    Report,
    RequestArrived,
    Resume,
    ReturnPages,
    Send,
    SessionPolicy,
    StartPrefill,
    Tick,
)
from pdkv.core.prefill_session import PrefillSession, PrefillState
from pdkv.core.residency import WantedBlocks
from pdkv.errors import FailureCode
from pdkv.wire.messages import Acquire, Cancel, Release

BLOCK = 128


@dataclass(frozen=True)
class World:
    """What happens to one transfer. Times in seconds; None = never."""

    seed: int
    num_tokens: int = 1000
    resident: float = 0.0
    """Share of the prompt's blocks that D has already; at least the last one is wanted."""
    cached: float = 0.0
    """Share of the prompt's whole blocks that P has already; the last token is always computed."""
    chunk: int = 256
    loss: float = 0.0
    duplicates: float = 0.0
    longest_delay: float = 0.01
    longest_read: float = 0.05
    chunk_time: float = 0.05
    sampling_time: float = 0.0
    """From the last watermark to the first token."""
    deadline: float = 40.0
    request_at: float | None = 0.0
    cancel_at: float | None = None
    abort_at: float | None = None
    engine_fails_at: float | None = None
    decode_sleeps: tuple[float, float] | None = None
    prefill_sleeps: tuple[float, float] | None = None
    partition: tuple[float, float] | None = None
    reads_hang: bool = False
    prefill_dies_at: float | None = None
    death_is_noticed: bool = True

    @property
    def resident_blocks(self) -> int:
        return int(self.resident * ((self.num_tokens - 1) // BLOCK))

    @property
    def cached_tokens(self) -> int:
        return int(self.cached * ((self.num_tokens - 1) // BLOCK)) * BLOCK


@dataclass
class PostedRead:
    blocks: range
    pages: tuple[int, ...]
    torn: bool = False
    over: bool = False


@dataclass
class Simulation:
    world: World
    now: float = 100.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    owned: set[int] = field(default_factory=set)
    reads: dict[int, PostedRead] = field(default_factory=dict)
    read_blocks: list[int] = field(default_factory=list)
    prefill_reports: list[Outcome] = field(default_factory=list)
    decode_reports: list[Outcome] = field(default_factory=list)
    resumed: int = 0
    returned: int = 0
    freed: int = 0
    prefill_dead: bool = False

    def __post_init__(self) -> None:
        self.random = random.Random(self.world.seed)
        self.order = itertools.count()
        self.appointments: dict[str, int] = {}
        self.start_time = self.now
        policy = SessionPolicy()
        self.prefill: PrefillSession | None = None
        self.policy = policy
        wanted = WantedBlocks(self.world.num_tokens, BLOCK, self.world.resident_blocks)
        self.decode = DecodeSession(policy, wanted, self.world.deadline, self.now)
        self.do_decode(self.decode.start(self.now))
        self.wake_decode()
        world = self.world
        if world.request_at is not None:
            self.at(world.request_at, lambda: self.to_prefill(RequestArrived(world.num_tokens, world.deadline)))
        for when, action in (
            (world.cancel_at, lambda: self.to_decode(LocalFailure(FailureCode.CANCELLED, "client gone"))),
            (world.abort_at, lambda: self.to_prefill(LocalFailure(FailureCode.CANCELLED, "router gave up"))),
            (world.engine_fails_at, lambda: self.to_prefill(LocalFailure(FailureCode.INTERNAL, "engine"))),
            (world.prefill_dies_at, self.kill_prefill),
        ):
            if when is not None:
                self.at(when, action)

    # ---- time

    def at(self, delay: float, action: Callable[[], None]) -> None:
        heapq.heappush(self.queue, (self.now + delay, next(self.order), action))

    def run(self, seconds: float) -> None:
        end = self.start_time + seconds
        while self.queue and self.queue[0][0] <= end:
            when, _, action = heapq.heappop(self.queue)
            self.now = max(self.now, when)
            action()
        self.now = end

    def asleep(self, side: tuple[float, float] | None) -> float:
        """Seconds until a sleeping side wakes (or a partition heals), 0 when it is awake."""
        if side is None:
            return 0.0
        start, length = side[0] + self.start_time, side[1]
        return start + length - self.now if start <= self.now < start + length else 0.0

    # ---- sessions

    def to_decode(self, event: object) -> None:
        wait = self.asleep(self.world.decode_sleeps)
        if wait > 0:
            self.at(wait, lambda: self.to_decode(event))
            return
        self.do_decode(self.decode.handle(event, self.now))  # type: ignore[arg-type]
        self.wake_decode()

    def to_prefill(self, event: object) -> None:
        wait = self.asleep(self.world.prefill_sleeps)
        if self.prefill_dead:
            return
        if wait > 0:
            self.at(wait, lambda: self.to_prefill(event))
            return
        if self.prefill is None:
            known = isinstance(event, RequestArrived) or (
                isinstance(event, MessageArrived) and isinstance(event.body, Acquire | Cancel | Release)
            )
            if not known:
                return
            self.prefill = PrefillSession(self.policy)
        self.do_prefill(self.prefill.handle(event, self.now))  # type: ignore[arg-type]
        self.wake_prefill()

    def wake_decode(self) -> None:
        self.wake("decode", self.decode, self.to_decode)

    def wake_prefill(self) -> None:
        assert self.prefill is not None
        self.wake("prefill", self.prefill, self.to_prefill)

    def wake(self, side: str, session: DecodeSession | PrefillSession, deliver: Callable[[object], None]) -> None:
        """Bring a Tick when the session next wants one; an older appointment is void."""
        when = session.next_wakeup()
        if when is None or session.forgettable(self.now):
            return
        appointment = self.appointments[side] = next(self.order)

        def tick() -> None:
            if self.appointments[side] == appointment:
                deliver(Tick())

        self.at(max(0.001, when - self.now), tick)

    # ---- instructions

    def do_decode(self, instructions: list[object]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(seq=seq, body=body):
                    self.transmit(lambda s=seq, b=body: self.to_prefill(MessageArrived(s, b)))
                case Read(read=read, blocks=blocks, source_pages=pages):
                    self.post(read, range(blocks.start, blocks.stop), pages)
                case Report(outcome=outcome):
                    self.decode_reports.append(outcome)
                case Resume(attachment=attachment):
                    assert attachment == b"more", "what travels with the first token was lost"
                    assert all(read.over for read in self.reads.values()), "resumed while a read was running"
                    assert not any(read.torn for read in self.reads.values()), "resumed on bytes of a reused page"
                    self.resumed += 1
                case ReturnPages():
                    assert all(read.over for read in self.reads.values()), "pages returned while a read was running"
                    self.returned += 1
                case ClosePeer():
                    for read in list(self.reads):
                        self.end_read(read, ok=False)

    def do_prefill(self, instructions: list[object]) -> None:
        for instruction in instructions:
            match instruction:
                case Send(seq=seq, body=body):
                    self.transmit(lambda s=seq, b=body: self.to_decode(MessageArrived(s, b)))
                case StartPrefill():
                    self.at(self.random.uniform(0, 0.1), self.reserve)
                case FreePages():
                    assert not self.freed, "freed twice"
                    self.freed += 1
                    for read in self.reads.values():
                        read.torn |= not read.over
                    self.owned.clear()
                case Report(outcome=outcome):
                    self.prefill_reports.append(outcome)

    def transmit(self, deliver: Callable[[], None]) -> None:
        for _ in range(2 if self.random.random() < self.world.duplicates else 1):
            if self.random.random() >= self.world.loss and not self.asleep(self.world.partition):
                self.at(self.random.uniform(0, self.world.longest_delay), deliver)

    # ---- P's engine

    def reserve(self) -> None:
        if self.freed or self.prefill_dead:
            return
        pages = tuple(self.random.sample(range(1, 500), -(-self.world.num_tokens // BLOCK)))
        self.owned = set(pages)
        cached = self.world.cached_tokens
        self.to_prefill(PagesReserved(pages, cached))
        self.at(self.world.chunk_time, lambda: self.compute(cached + self.world.chunk))

    def compute(self, tokens: int) -> None:
        if self.freed or self.prefill_dead:
            return
        self.to_prefill(Progressed(min(tokens, self.world.num_tokens)))
        if tokens >= self.world.num_tokens:
            self.at(self.world.sampling_time, lambda: self.to_prefill(PrefillEnded(7, -0.5, b"more")))
        else:
            self.at(self.world.chunk_time, lambda: self.compute(tokens + self.world.chunk))

    def kill_prefill(self) -> None:
        self.prefill_dead = True
        self.owned.clear()
        for read in self.reads.values():
            read.torn |= not read.over
        if self.world.death_is_noticed:
            for read in list(self.reads):
                self.at(0.1, lambda r=read: self.end_read(r, ok=False))
            self.at(0.2, lambda: self.to_decode(PeerLost("prefill has died")))

    # ---- the transport

    def post(self, read: int, blocks: range, pages: tuple[int, ...]) -> None:
        assert read not in self.reads
        self.read_blocks.extend(blocks)
        self.reads[read] = PostedRead(blocks, pages, torn=not set(pages) <= self.owned)
        if self.prefill_dead:
            if self.world.death_is_noticed:
                self.at(0.1, lambda: self.end_read(read, ok=False))
        elif not self.world.reads_hang:
            self.at(self.random.uniform(0, self.world.longest_read), lambda: self.end_read(read, ok=True))

    def end_read(self, read: int, *, ok: bool) -> None:
        if not self.reads[read].over and not (ok and self.prefill_dead):
            self.reads[read].over = True
            self.to_decode(ReadEnded(read, ok, "" if ok else "endpoint closed"))

    # ---- what must hold at the end

    def validate(self) -> None:
        """Every wanted page at most once, exactly one end on each side, nothing held."""
        blocks = -(-self.world.num_tokens // BLOCK)
        assert len(set(self.read_blocks)) == len(self.read_blocks), "a block was read twice"
        assert self.decode.state is DecodeState.ENDED
        assert len(self.decode_reports) == 1
        assert self.resumed + self.returned == 1
        assert self.resumed == (self.decode_reports[0].code is None)
        if self.resumed:
            assert sorted(self.read_blocks) == list(range(self.world.resident_blocks, blocks))
            assert self.decode.cached_tokens == self.world.cached_tokens
        if self.prefill is not None and not self.prefill_dead:
            assert self.prefill.state is PrefillState.ENDED
            assert len(self.prefill_reports) == 1
            assert not self.owned, "P still holds pages"
