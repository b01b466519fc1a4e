"""D's side of one transfer: the lease, which blocks to read when, and when its pages may be attended to or reused.

    ACQUIRING --Granted--> RECEIVING --Done held, every block resident and verified--> ENDED (Resume, Release)
        anything that goes wrong: FAILING until every posted read has ended, then ENDED (ReturnPages, Cancel)

A session that has ended stays as a tombstone for a while and answers late messages with how it ended.
"""

from enum import Enum
from itertools import pairwise

from pdkv.core.events import (
    Check,
    Checked,
    ClosePeer,
    DecodeEvent,
    DecodeInstruction,
    LocalFailure,
    MessageArrived,
    Outcome,
    PeerLost,
    Read,
    ReadEnded,
    Report,
    Resume,
    ReturnPages,
    Send,
    SessionPolicy,
    Tick,
)
from pdkv.core.lease import HeldLease
from pdkv.core.residency import BlockRange, Residency, WantedBlocks
from pdkv.core.verification import Verification
from pdkv.errors import FailureCode
from pdkv.schema import VerifyPages
from pdkv.wire.messages import (
    Ack,
    Acquire,
    Body,
    Cancel,
    Digests,
    Done,
    Failed,
    Granted,
    Refused,
    Release,
    Renew,
    Watermark,
)
from pdkv.wire.outbox import Copy, Outbox, OwedAcks


class DecodeState(Enum):
    ACQUIRING = "acquiring"
    RECEIVING = "receiving"
    FAILING = "failing"
    ENDED = "ended"


class DecodeSession:
    """One transfer on D, which holds pages for it already. Owned by the agent thread; not thread-safe."""

    def __init__(
        self,
        policy: SessionPolicy,
        wanted: WantedBlocks,
        deadline_s: float,
        now: float,
        verify: VerifyPages = VerifyPages.OFF,
    ) -> None:
        """``verify``: which digests must be equal before the blocks count."""
        self.state = DecodeState.ACQUIRING
        self.outcome: Outcome | None = None
        self._policy = policy
        self._wanted = wanted
        self._deadline = now + deadline_s
        self._ack_by = now + policy.lease.ttl_s
        self._outbox = Outbox(policy.resend)
        self._owed = OwedAcks(policy.resend)
        """Of Granted and Watermark: a short prompt's are spared by Release."""
        self._lease = HeldLease(policy.lease)
        self._renew_at: float | None = None
        self._residency = Residency(wanted.num_blocks, wanted.first)
        self._verify = verify
        self._verification = Verification(wanted) if verify is not VerifyPages.OFF else None
        self._source_pages: tuple[int, ...] = ()
        self._watermark: tuple[int, ...] = ()
        """Tokens of each layer group; of none until something was heard."""
        self.cached_tokens = 0
        """Prompt tokens that P had before, as it says."""
        self._done: Done | None = None
        self._next_read = 1
        self._close_at: float | None = None
        self._peer_lost = False
        self._forget_at = float("inf")
        self._out: list[DecodeInstruction] = []

    def start(self, now: float) -> list[DecodeInstruction]:
        """The first instructions: ask P for the state."""
        self._out = []
        self._put(Acquire(self._policy.lease.ttl_s, self._verify, self._wanted.first), now)
        return self._out

    def handle(self, event: DecodeEvent, now: float) -> list[DecodeInstruction]:
        self._out = []
        self._advance(now)
        match event:
            case Tick():
                pass
            case MessageArrived(seq=seq, body=body):
                self._on_message(seq, body, now)
            case ReadEnded():
                self._on_read(event, now)
            case Checked():
                self._on_checked(event, now)
            case LocalFailure(code=code, message=message):
                self._fail(code, message, now)
            case PeerLost(message=message):
                self._peer_lost = True
                self._outbox.clear()
                self._owed.take()
                self._fail(FailureCode.PEER_LOST, message, now)
        self._drain(now)
        return self._out

    def next_wakeup(self) -> float | None:
        """When to bring the next ``Tick`` at the latest."""
        times = [self._outbox.next_due(), self._owed.due]
        if self.state is DecodeState.ENDED:
            times.append(self._forget_at)
        elif self.state is DecodeState.FAILING:
            times.append(self._close_at)
        else:
            times += [self._deadline, self._renew_at, self._lease.until or self._ack_by]
        return min((t for t in times if t is not None), default=None)

    def forgettable(self, now: float) -> bool:
        """Nothing is held, nothing is posted, and nobody can still ask."""
        return self.state is DecodeState.ENDED and now >= self._forget_at

    @property
    def num_reads_outstanding(self) -> int:
        return self._residency.num_outstanding

    # ---- time

    def _advance(self, now: float) -> None:
        if self.state in (DecodeState.ACQUIRING, DecodeState.RECEIVING):
            if now >= self._deadline:
                self._fail(FailureCode.DEADLINE, "the request's deadline has passed", now)
            elif self._lease.expired(now):
                self._fail(FailureCode.LEASE_EXPIRED, "the lease ended before everything had arrived", now)
            elif self._lease.until is None and now >= self._ack_by:
                self._fail(FailureCode.PEER_LOST, "prefill did not answer Acquire", now)
            elif self._renew_at is not None and now >= self._renew_at:
                self._renew_at = None  # set again by the acknowledgement
                self._put(Renew(ttl_s=self._policy.lease.ttl_s), now)
        if self._owed.due is not None and now >= self._owed.due:
            self._acknowledge()
        for copy in self._outbox.due(now):
            self._send(copy)

    def _drain(self, now: float) -> None:
        """Of a failed transfer: wait for the posted reads, by force if they take too long, then let go."""
        if self.state is not DecodeState.FAILING:
            return
        if self._residency.num_outstanding:
            if self._close_at is not None and now >= self._close_at:
                self._close_at = None
                self._out.append(ClosePeer("reads of a failed transfer did not end in time"))
            return
        assert self.outcome is not None
        self._end(now)
        self._out.append(ReturnPages())
        if not self._peer_lost:
            self._put(self._farewell(), now)

    # ---- P's messages

    def _on_message(self, seq: int, body: Body, now: float) -> None:
        if isinstance(body, Ack):
            self._on_ack(body.seq, now)
            return
        if not isinstance(body, Granted | Watermark | Digests | Done | Failed | Refused):
            return
        if self.state is DecodeState.ENDED:
            self._send(self._outbox.once(Ack(seq=seq)))
            if not isinstance(body, Failed | Refused):
                self._send(self._outbox.once(self._farewell()))
            return
        self._owed.owe(seq, now)
        match body:
            case Granted():
                self._on_granted(body, now)
            case Watermark(tokens=tokens):
                self._raise_watermark(tokens)
            case Digests():
                self._on_digests(body, now)
            case Done():
                self._done = self._done or body
            case Failed(code=code, message=message) | Refused(code=code, message=message):
                self._fail(code, f"prefill: {message}", now)
        self._read_what_is_complete(now)
        self._succeed_if_complete(now)  # all may have landed before Done
        if self.state is not DecodeState.RECEIVING or isinstance(body, Done | Digests):
            self._acknowledge()

    def _on_ack(self, seq: int, now: float) -> None:
        settled = self._outbox.acknowledge(seq)
        if settled is None or not isinstance(settled.body, Acquire | Renew):
            return
        self._lease.acknowledged(settled.sent_at)
        self._renew_at = settled.sent_at + self._policy.lease.renew_every_s
        self._read_what_is_complete(now)

    def _on_granted(self, granted: Granted, now: float) -> None:
        if self.state is not DecodeState.ACQUIRING:
            return
        wanted = self._wanted.num_tokens
        if granted.num_tokens != wanted or len(granted.pages) != self._residency.num_blocks:
            told = f"{granted.num_tokens} tokens in {len(granted.pages)} pages"
            self._fail(FailureCode.INTERNAL, f"prefill granted {told} for a prompt of {wanted} tokens", now)
            return
        starts = granted.layer_groups
        if starts[0] != 0 or any(a >= b for a, b in pairwise(starts)):
            self._fail(FailureCode.INTERNAL, f"prefill's layer groups begin at {starts}, not ascending from 0", now)
            return
        self.state = DecodeState.RECEIVING
        self._source_pages = granted.pages
        self.cached_tokens = granted.cached_tokens
        self._residency = Residency(self._wanted.num_blocks, self._wanted.first, starts)
        if self._verification is not None:
            self._verification.granted(len(starts))
        self._raise_watermark((granted.cached_tokens,) * len(starts))
        if len(self._watermark) != len(starts):
            self._fail(FailureCode.INTERNAL, f"a watermark of {len(self._watermark)} of {len(starts)} groups", now)

    def _raise_watermark(self, tokens: tuple[int, ...]) -> None:
        """Element-wise maximum. One of other layer groups than before says nothing that could be believed."""
        if not self._watermark:
            self._watermark = tokens
        elif len(tokens) == len(self._watermark):
            self._watermark = tuple(map(max, self._watermark, tokens))

    # ---- reads

    def _read_what_is_complete(self, now: float) -> None:
        """Post every block of every layer group that is complete in P's pages: each once, only under a valid lease."""
        if self.state is not DecodeState.RECEIVING or not self._lease.valid(now):
            return
        everything = self._wanted.num_tokens if self._done else 0
        for part in self._residency.take([self._wanted.complete(max(n, everything)) for n in self._watermark]):
            read = self._next_read
            self._next_read += 1
            self._residency.posted(read, part)
            pages = self._source_pages[part.blocks.start : part.blocks.stop]
            self._out.append(Read(read, part.blocks, pages, part.layers))

    def _on_read(self, ended: ReadEnded, now: float) -> None:
        receiving = self.state is DecodeState.RECEIVING  # an expired lease has ended that in _advance already
        part = self._residency.ended(ended.read, valid=ended.ok and receiving)
        if part is None or not receiving:
            return
        if not ended.ok:
            self._fail(FailureCode.READ_FAILED, f"a read from prefill failed: {ended.error}", now)
            return
        if self._verification is not None:
            self._verification.landed(part)
            self._check_what_is_told()
        self._succeed_if_complete(now)

    # ---- digests

    def _on_digests(self, digests: Digests, now: float) -> None:
        if self._verification is None or self.state not in (DecodeState.ACQUIRING, DecodeState.RECEIVING):
            return
        if wrong := self._verification.told(digests):
            self._fail(FailureCode.INTERNAL, wrong, now)
        else:
            self._check_what_is_told()

    def _check_what_is_told(self) -> None:
        assert self._verification is not None, "nobody else looks"
        for digests in self._verification.take():
            self._out.append(Check(BlockRange(digests.start, digests.stop), digests.by_rank))

    def _on_checked(self, checked: Checked, now: float) -> None:
        if self.state is not DecodeState.RECEIVING or self._verification is None:
            return
        if checked.code is not None:
            self._fail(checked.code, checked.message, now)
        else:
            self._verification.equal(checked.blocks)
            self._succeed_if_complete(now)

    # ---- ends

    def _succeed_if_complete(self, now: float) -> None:
        if self.state is not DecodeState.RECEIVING or self._done is None or not self._residency.complete:
            return
        if self._verification is not None and not self._verification.complete:
            return
        self._end(now)
        self._settle(Outcome())
        self._out.append(Resume(self._done.token, self._done.logprob, self._done.attachment))
        self._put(Release(), now)

    def _fail(self, code: FailureCode, message: str, now: float) -> None:
        if self.state in (DecodeState.FAILING, DecodeState.ENDED):
            return
        self.state = DecodeState.FAILING
        self._close_at = now + self._policy.close_grace_s
        self._outbox.clear()
        self._acknowledge()
        self._settle(Outcome(code, message))

    def _end(self, now: float) -> None:
        self.state = DecodeState.ENDED
        self._outbox.clear()
        self._owed.take()  # Release, or Cancel, says as much
        self._forget_at = max(now, self._deadline) + self._policy.resend.horizon_s

    def _settle(self, outcome: Outcome) -> None:
        assert self.outcome is None, "a session reports one outcome"
        self.outcome = outcome
        self._out.append(Report(outcome))

    def _acknowledge(self) -> None:
        for seq in self._owed.take():
            self._send(self._outbox.once(Ack(seq=seq)))

    def _farewell(self) -> Body:
        outcome = self.outcome
        assert outcome is not None
        return Release() if outcome.code is None else Cancel(outcome.code, outcome.message)

    def _put(self, body: Body, now: float) -> None:
        self._send(self._outbox.put(body, now))

    def _send(self, copy: Copy) -> None:
        self._out.append(Send(seq=copy.seq, body=copy.body))
