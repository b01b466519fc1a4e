"""A world in which one transfer happens: a network that loses, repeats and reorders, engines, one-sided reads, crashes.

Time is simulated; everything random comes from one seed. Pages of P carry an owner, so that a read of a page that was
reused meanwhile is seen, whatever the sessions believe; and P's engine knows which layers of which tokens it has
written.
"""

import heapq
import itertools
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from pdkv.core.decode_session import DecodeSession, DecodeState
from pdkv.core.events import (
    Check,
    Checked,
    ClosePeer,
    Digest,
    Digested,
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
from pdkv.core.residency import BlockRange, WantedBlocks
from pdkv.errors import FailureCode
from pdkv.schema import LayerRange, VerifyPages
from pdkv.wire.messages import Acquire, Cancel, Release

BLOCK = 128
NUM_LAYERS = 12


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
    layer_groups: tuple[int, ...] = (0,)
    """First layers of the groups in which P tells of a chunk."""
    all_chunks: bool = False
    """It tells so of every chunk, not of the last alone."""
    early: bool = False
    """P's engine begins when it has the router's request, and does not wait for Acquire."""
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
    verify: VerifyPages = VerifyPages.OFF
    damage: float = 0.0
    """Share of reads that bring other bytes than P wrote, and say nothing."""
    longest_digest: float = 0.1
    """P's and D's for a run of blocks."""
    blocks_a_digest: int = 100
    """Most blocks that P digests at once."""
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
    parts: list[tuple[int, int]]
    """Block and layer group."""
    pages: tuple[int, ...]
    torn: bool = False
    damaged: bool = False
    over: bool = False


@dataclass
class Simulation:
    world: World
    now: float = 100.0
    queue: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    owned: set[int] = field(default_factory=set)
    reads: dict[int, PostedRead] = field(default_factory=dict)
    read_parts: list[tuple[int, int]] = field(default_factory=list)
    prefill_reports: list[Outcome] = field(default_factory=list)
    decode_reports: list[Outcome] = field(default_factory=list)
    resumed: int = 0
    returned: int = 0
    freed: int = 0
    prefill_dead: bool = False
    has_begun: bool = False
    attempt: int = 0
    """How often pages that nobody acquired were taken back."""
    is_wanted: bool = False
    """P's session has told its engine to compute."""
    digested: set[int] = field(default_factory=set)
    checked: list[int] = field(default_factory=list)
    mismatched: bool = False
    let_go: bool = False
    """The transfer ended before it did."""

    def __post_init__(self) -> None:
        self.random = random.Random(self.world.seed)
        self.order = itertools.count()
        self.appointments: dict[str, int] = {}
        self.start_time = self.now
        self.written = [0] * len(self.world.layer_groups)
        policy = SessionPolicy(layer_groups=self.world.layer_groups)
        self.prefill: PrefillSession | None = None
        self.policy = policy
        wanted = WantedBlocks(self.world.num_tokens, BLOCK, self.world.resident_blocks)
        self.decode = DecodeSession(policy, wanted, self.world.deadline, self.now, self.world.verify)
        self.do_decode(self.decode.start(self.now))
        self.wake_decode()
        world = self.world
        if world.request_at is not None:
            self.at(world.request_at, self.request)
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
            self.prefill = PrefillSession(self.policy, BLOCK)
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
                case Read():
                    self.post(instruction)
                case Check(blocks=blocks, by_rank=by_rank):
                    self.at(
                        self.random.uniform(0, self.world.longest_digest), lambda b=blocks, d=by_rank: self.check(b, d)
                    )
                case Report(outcome=outcome):
                    self.decode_reports.append(outcome)
                case Resume(attachment=attachment):
                    assert attachment == b"more", "what travels with the first token was lost"
                    assert all(read.over for read in self.reads.values()), "resumed while a read was running"
                    assert not any(read.torn for read in self.reads.values()), "resumed on bytes of a reused page"
                    if self.world.verify is not VerifyPages.OFF:
                        assert not any(read.damaged for read in self.reads.values()), (
                            "resumed on bytes that P never wrote"
                        )
                        assert sorted(self.checked) == list(range(self.world.resident_blocks, self.num_blocks))
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
                    assert not self.is_wanted, "wanted twice"
                    self.is_wanted = True
                    self.begin()
                case Digest():
                    self.digest(instruction)
                case FreePages() if not self.is_wanted and not any(isinstance(one, Report) for one in instructions):
                    self.owned.clear()
                    self.has_begun = False
                    self.attempt += 1
                case FreePages():
                    assert not self.freed, "freed twice"
                    self.freed += 1
                    for read in self.reads.values():
                        read.torn |= not read.over
                    self.owned.clear()
                case Report(outcome=outcome):
                    self.prefill_reports.append(outcome)
                    if not self.is_wanted:
                        self.let_go = True
                        self.owned.clear()

    # ---- digests: P's of a block are its number, where its page holds what P wrote

    @property
    def num_blocks(self) -> int:
        return -(-self.world.num_tokens // BLOCK)

    def digest(self, asked: Digest) -> None:
        assert asked.verify is self.world.verify
        for block, page in zip(range(asked.blocks.start, asked.blocks.stop), asked.pages, strict=True):
            assert page in self.owned, "digests of a page that was given back"
            assert min(self.written) >= min((block + 1) * BLOCK, self.world.num_tokens), "digests of half a block"
            assert block not in self.digested, "a block was digested twice"
            assert block >= self.world.resident_blocks, "digests that nobody will compare"
            self.digested.add(block)
        for start in range(asked.blocks.start, asked.blocks.stop, self.world.blocks_a_digest):
            blocks = BlockRange(start, min(start + self.world.blocks_a_digest, asked.blocks.stop))
            told = Digested(blocks, (bytes(block % 256 for block in range(blocks.start, blocks.stop)),))
            self.at(self.random.uniform(0, self.world.longest_digest), lambda told=told: self.to_prefill(told))

    def check(self, blocks: BlockRange, by_rank: tuple[bytes, ...]) -> None:
        numbers = range(blocks.start, blocks.stop)
        assert by_rank == (bytes(block % 256 for block in numbers),), "P's digests of other blocks"
        reads = [read for read in self.reads.values() if any(block in numbers for block, _ in read.parts)]
        parts = {part for read in reads if read.over for part in read.parts}
        landed = all((block, group) in parts for block in numbers for group in range(len(self.written)))
        assert landed, "compared before it had landed"
        self.checked += numbers
        wrong = any(read.damaged for read in reads)
        self.mismatched |= wrong
        code = FailureCode.DIGEST_MISMATCH if wrong else None
        self.to_decode(Checked(blocks, code, "index_k is not what prefill wrote" if wrong else ""))

    def transmit(self, deliver: Callable[[], None]) -> None:
        for _ in range(2 if self.random.random() < self.world.duplicates else 1):
            if self.random.random() >= self.world.loss and not self.asleep(self.world.partition):
                self.at(self.random.uniform(0, self.world.longest_delay), deliver)

    # ---- P's engine

    @property
    def computes(self) -> bool:
        return not (self.freed or self.prefill_dead or self.let_go)

    def request(self) -> None:
        self.to_prefill(RequestArrived(self.world.num_tokens, self.world.deadline))
        if self.world.early and not self.let_go:
            self.begin()

    def begin(self) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.compute_in(self.random.uniform(0, 0.1), self.reserve)

    def compute_in(self, delay: float, act: Callable[[], None]) -> None:
        """Unless the pages are taken back until then."""
        attempt = self.attempt
        self.at(delay, lambda: act() if attempt == self.attempt else None)

    def reserve(self) -> None:
        if not self.computes:
            return
        pages = tuple(self.random.sample(range(1, 500), -(-self.world.num_tokens // BLOCK)))
        self.owned = set(pages)
        cached = self.world.cached_tokens
        self.written = [cached] * len(self.written)
        self.to_prefill(PagesReserved(pages, cached))
        self.compute_in(self.world.chunk_time, lambda: self.compute(cached + self.world.chunk))

    def compute(self, tokens: int) -> None:
        """A chunk's first layer group is written: tell, if it is told of, and go on with the next."""
        is_last = tokens >= self.world.num_tokens
        if is_last or self.world.all_chunks:
            self.compute_group(min(tokens, self.world.num_tokens), 0)
        else:
            self.end_chunk(tokens)

    def compute_group(self, tokens: int, group: int) -> None:
        if not self.computes:
            return
        self.written[group] = tokens
        self.to_prefill(Progressed(tokens, group + 1))
        if group + 1 < len(self.written):
            step = self.world.chunk_time / len(self.written)
            self.compute_in(step, lambda: self.compute_group(tokens, group + 1))
        else:
            self.end_chunk(tokens)

    def end_chunk(self, tokens: int) -> None:
        if not self.computes:
            return
        tokens = min(tokens, self.world.num_tokens)
        self.written = [tokens] * len(self.written)
        self.to_prefill(Progressed(tokens))
        if tokens == self.world.num_tokens:
            self.compute_in(self.world.sampling_time, lambda: self.to_prefill(PrefillEnded(7, -0.5, b"more")))
        else:
            self.compute_in(self.world.chunk_time, lambda: self.compute(tokens + self.world.chunk))

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

    def groups_of(self, layers: LayerRange) -> list[int]:
        """The layer groups in a range, which must be whole ones."""
        starts = self.world.layer_groups
        ends = [*starts[1:], None]
        assert layers.start in starts
        assert layers.stop in ends
        return [g for g, start in enumerate(starts) if start in layers]

    def post(self, asked: Read) -> None:
        read, pages = asked.read, asked.source_pages
        assert read not in self.reads
        blocks = range(asked.blocks.start, asked.blocks.stop)
        parts = [(block, group) for group in self.groups_of(asked.layers) for block in blocks]
        torn = not set(pages) <= self.owned
        for block, group in parts if not torn else ():
            needed = min((block + 1) * BLOCK, self.world.num_tokens)
            assert self.written[group] >= needed, f"block {block} of layer group {group} was read before it was written"
        self.read_parts.extend(parts)
        damaged = self.world.damage > 0 and self.random.random() < self.world.damage
        self.reads[read] = PostedRead(parts, pages, torn=torn, damaged=damaged)
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
        assert len(set(self.read_parts)) == len(self.read_parts), "a layer group of a block was read twice"
        assert self.decode.state is DecodeState.ENDED
        assert len(self.decode_reports) == 1
        assert self.resumed + self.returned == 1
        assert self.resumed == (self.decode_reports[0].code is None)
        assert not (self.resumed and self.mismatched), "resumed although a digest differed"
        if self.world.verify is VerifyPages.OFF:
            assert not self.digested, "P computed digests that nobody asked for"
        if self.resumed:
            wanted = itertools.product(range(self.world.resident_blocks, blocks), range(len(self.written)))
            assert sorted(self.read_parts) == list(wanted)
            assert self.decode.cached_tokens == self.world.cached_tokens
        if self.prefill is not None and not self.prefill_dead:
            assert self.prefill.state is PrefillState.ENDED
            assert len(self.prefill_reports) == 1
            assert not self.owned, "P still holds pages"
