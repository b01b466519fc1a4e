"""P's side of one transfer: when to compute, what to tell D, and until when the pages must stay.

    WAITING_REQUEST --request--> QUEUED --pages--> PREFILLING --first token--> DONE --Release--> ENDED
    WAITING_ACQUIRE --Acquire-->   |                   |                        |
          anything that goes wrong once pages are granted: FAILING (pages stay until D lets go or the lease ends)

An idle engine may begin before Acquire is here. What it has by then, and has done, is told in answer to Acquire, and
not before; until then nobody may read its pages, so they come back at once when the transfer ends, or when Acquire is
not here within a lease's time: then the engine begins anew if it comes later.

A session that has ended stays as a tombstone for a while and answers late messages with how it ended.
"""

from enum import Enum

from pdkv.core.events import (
    Digest,
    Digested,
    FreePages,
    LocalFailure,
    MessageArrived,
    Outcome,
    PagesReserved,
    PeerLost,
    PrefillEnded,
    PrefillEvent,
    PrefillInstruction,
    Progressed,
    Report,
    RequestArrived,
    Send,
    SessionPolicy,
    StartPrefill,
    Tick,
)
from pdkv.core.lease import GrantedLease, LeaseView
from pdkv.core.residency import WantedBlocks
from pdkv.core.verification import OwedDigests
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


class PrefillState(Enum):
    WAITING_REQUEST = "waiting_request"
    WAITING_ACQUIRE = "waiting_acquire"
    QUEUED = "queued"
    PREFILLING = "prefilling"
    DONE = "done"
    FAILING = "failing"
    ENDED = "ended"


class PrefillSession:
    """One transfer on P. Owned by the agent thread; not thread-safe. Starts with nothing known."""

    def __init__(self, policy: SessionPolicy, digest_block: int = 0) -> None:
        """``digest_block``: tokens of a block, where digests of pages can be computed; 0 = they cannot."""
        self.state = PrefillState.WAITING_REQUEST
        self.outcome: Outcome | None = None
        self.lease_expired = False
        """It ended by time, not by D's word."""
        self._policy = policy
        self._outbox = Outbox(policy.resend)
        self._owed = OwedAcks(policy.resend)
        """Of Acquire alone: it leaves with Granted, or when its time has come."""
        self._lease = GrantedLease()
        self._digest_block = digest_block
        self._acquire = Acquire(ttl_s=0.0)
        """The first that came; what it says of digests stands."""
        self._granted: Granted | None = None
        self.granted_at = 0.0
        """When D was given its pages."""
        self._owed_digests: OwedDigests | None = None
        """From the grant on, where D wants some."""
        self._num_tokens: int | None = None
        self._early: Granted | None = None
        """Of pages that the engine took before Acquire."""
        self._acquire_by: float | None = None
        """Until when it keeps them."""
        self._done: Done | None = None
        self._watermark = [0] * len(policy.layer_groups)
        self._deadline: float | None = None
        self._request_by: float | None = None
        self._forget_at = float("inf")
        self._out: list[PrefillInstruction] = []

    def handle(self, event: PrefillEvent, now: float) -> list[PrefillInstruction]:
        self._out = []
        self._advance(now)
        match event:
            case Tick():
                pass
            case MessageArrived(seq=seq, body=body):
                self._on_message(seq, body, now)
            case RequestArrived(num_tokens=num_tokens, deadline_s=deadline_s):
                self._on_request(num_tokens, deadline_s, now)
            case PagesReserved(pages=pages, cached_tokens=cached):
                self._on_pages(pages, cached, now)
            case Progressed(tokens=tokens, num_groups=num_groups):
                self._on_progress(tokens, num_groups, now)
            case PrefillEnded():
                self._on_prefilled(event, now)
            case Digested():
                self._on_digested(event, now)
            case LocalFailure(code=code, message=message):
                self._fail(code, message, now)
            case PeerLost(message=message):
                if self.state is not PrefillState.ENDED:
                    self._outbox.clear()
                    self._end(Outcome(FailureCode.PEER_LOST, message), now)
        return self._out

    def next_wakeup(self) -> float | None:
        """When to bring the next ``Tick`` at the latest."""
        times = [self._outbox.next_due(), self._owed.due]
        if self.state is PrefillState.ENDED:
            times.append(self._forget_at)
        else:
            times.append(self._lease.until)
            if self.state is not PrefillState.FAILING:  # then it has had its effect
                times.append(self._deadline)
            if self.state is PrefillState.WAITING_REQUEST:
                times.append(self._request_by)
            elif self.state is PrefillState.WAITING_ACQUIRE:
                times.append(self._acquire_by)
        return min((t for t in times if t is not None), default=None)

    def forgettable(self, now: float) -> bool:
        """Nothing is held, and nobody can still ask."""
        return self.state is PrefillState.ENDED and now >= self._forget_at

    @property
    def holds_lease(self) -> bool:
        return self.state in (PrefillState.PREFILLING, PrefillState.DONE, PrefillState.FAILING)

    def lease(self, now: float) -> LeaseView | None:
        """The lease under which D may read its pages; None where there is none."""
        if not self.holds_lease or self._granted is None:
            return None
        left_s = max(0.0, (self._lease.until or now) - now)
        return LeaseView(self.state.value, len(self._granted.pages), now - self.granted_at, left_s)

    # ---- time

    def _advance(self, now: float) -> None:
        if self.state is not PrefillState.ENDED:
            if self._lease.expired(now):
                self._expire(now)
            elif (
                self.state is PrefillState.WAITING_REQUEST and self._request_by is not None and now >= self._request_by
            ):
                self._refuse(FailureCode.UNKNOWN_TRANSFER, "no request came for this transfer", now)
            elif self._deadline is not None and now >= self._deadline:
                self._fail(FailureCode.DEADLINE, "the request's deadline has passed", now)
            elif (
                self.state is PrefillState.WAITING_ACQUIRE and self._acquire_by is not None and now >= self._acquire_by
            ):
                self._take_back()
        if self._owed.due is not None and now >= self._owed.due:
            self._acknowledge()
        for copy in self._outbox.due(now):
            self._send(copy)

    def _expire(self, now: float) -> None:
        """D may read no more: whatever it holds, it stopped before this moment."""
        if self.state is PrefillState.WAITING_REQUEST:
            self._refuse(FailureCode.UNKNOWN_TRANSFER, "no request came for this transfer", now)
            return
        self.lease_expired = True
        if self.state is not PrefillState.FAILING:
            self._put(Failed(FailureCode.LEASE_EXPIRED, "decode did not renew its lease in time"), now)
        self._end(Outcome(FailureCode.LEASE_EXPIRED, "decode did not renew its lease in time"), now)

    # ---- the router's request and the engine

    def _on_request(self, num_tokens: int, deadline_s: float, now: float) -> None:
        if self.state is not PrefillState.WAITING_REQUEST or self._num_tokens is not None:
            return
        self._num_tokens = num_tokens
        self._deadline = now + deadline_s
        if self._lease.until is None:
            self.state = PrefillState.WAITING_ACQUIRE
        else:
            self._start(now)

    def _start(self, now: float) -> None:
        self.state = PrefillState.QUEUED
        self._out.append(StartPrefill())
        if self._early is not None:
            self._grant(self._early, now)

    def _on_pages(self, pages: tuple[int, ...], cached_tokens: int, now: float) -> None:
        if self.state not in (PrefillState.WAITING_ACQUIRE, PrefillState.QUEUED):
            return
        assert self._num_tokens is not None
        granted = Granted(
            pages=pages,
            num_tokens=self._num_tokens,
            cached_tokens=cached_tokens,
            layer_groups=self._policy.layer_groups,
        )
        if self.state is PrefillState.QUEUED:
            self._grant(granted, now)
        else:
            self._early = granted
            self._acquire_by = now + self._policy.lease.ttl_s

    def _take_back(self) -> None:
        """D may never ask, and no lease ends what nobody has acquired."""
        self._early = self._acquire_by = self._done = None
        self._watermark = [0] * len(self._watermark)
        self._out.append(FreePages())

    def _grant(self, granted: Granted, now: float) -> None:
        """From here on D may read; what is done already it may read at once."""
        self.state = PrefillState.PREFILLING
        self._acknowledge()  # D reads under a lease, so it wants this first
        self._put(granted, now)
        self._granted, self.granted_at = granted, now
        if not self._owe_digests(now):
            return
        if self._done is not None:
            self._tell_done(self._done, now)
        elif any(self._watermark):
            self._put(Watermark(tokens=tuple(self._watermark)), now)
        self._digest_what_is_complete()

    def _on_progress(self, tokens: int, num_groups: int | None, now: float) -> None:
        is_early = self.state is PrefillState.WAITING_ACQUIRE and self._early is not None
        if self.state is not PrefillState.PREFILLING and not is_early:
            return
        for group in range(len(self._watermark))[:num_groups]:
            self._watermark[group] = max(self._watermark[group], tokens)
        if self.state is PrefillState.PREFILLING:
            self._put(Watermark(tokens=tuple(self._watermark)), now)
            self._digest_what_is_complete()

    def _on_prefilled(self, ended: PrefillEnded, now: float) -> None:
        done = Done(ended.token, ended.logprob, ended.attachment)
        if self.state is PrefillState.PREFILLING:
            self._tell_done(done, now)
        elif self.state is PrefillState.WAITING_ACQUIRE and self._early is not None:
            self._done = done

    def _tell_done(self, done: Done, now: float) -> None:
        self.state = PrefillState.DONE
        self._outbox.withdraw(Watermark)
        self._put(done, now)
        self._digest_what_is_complete()

    # ---- digests of pages

    def _owe_digests(self, now: float) -> bool:
        """Of the request that was granted, if D wants any. False for one that can have none."""
        asked = self._acquire
        if asked.verify is VerifyPages.OFF:
            return True
        assert self._num_tokens is not None
        if asked.first_block * self._digest_block >= self._num_tokens:
            told = f"decode wants digests from block {asked.first_block} on, of a prompt of {self._num_tokens} tokens"
            self._fail(FailureCode.INTERNAL, told, now)
            return False
        self._owed_digests = OwedDigests(WantedBlocks(self._num_tokens, self._digest_block, asked.first_block))
        return True

    def _digest_what_is_complete(self) -> None:
        """Of blocks whose every layer is written: once each, as soon as D may read them."""
        if self._owed_digests is None or self._granted is None:
            return
        granted, tokens = self._granted, max(self._granted.cached_tokens, min(self._watermark))
        blocks = self._owed_digests.take(granted.num_tokens if self.state is PrefillState.DONE else tokens)
        if blocks is not None:
            pages = granted.pages[blocks.start : blocks.stop]
            self._out.append(Digest(blocks, pages, self._acquire.verify, granted.num_tokens))

    def _on_digested(self, digested: Digested, now: float) -> None:
        if self._owed_digests is None or self.state not in (PrefillState.PREFILLING, PrefillState.DONE):
            return
        if digested.error:
            self._fail(FailureCode.INTERNAL, f"digests of pages could not be computed: {digested.error}", now)
            return
        self._owed_digests.put(Digests(digested.blocks.start, digested.blocks.stop, digested.by_rank))
        self._send_digests(now)

    def _send_digests(self, now: float) -> None:
        """One message at a time: the outbox keeps one of a kind."""
        if self.state not in (PrefillState.PREFILLING, PrefillState.DONE) or self._owed_digests is None:
            return
        if self._outbox.holds(Digests):
            return
        if (digests := self._owed_digests.next()) is not None:
            self._put(digests, now)

    # ---- D's messages

    def _on_message(self, seq: int, body: Body, now: float) -> None:
        match body:
            case Ack(seq=copy):
                self._outbox.acknowledge(copy)
                self._send_digests(now)
            case Acquire(ttl_s=ttl_s) | Renew(ttl_s=ttl_s):
                self._on_lease_wanted(seq, body, ttl_s, now)
            case Release() | Cancel():
                self._send(self._outbox.once(Ack(seq=seq)))
                if self.state is not PrefillState.ENDED:
                    self._end(self._outcome_of(body), now)
            case _:
                pass  # a prefill session has no use for P's own kinds of message

    def _on_lease_wanted(self, seq: int, body: Body, ttl_s: float, now: float) -> None:
        if self.state in (PrefillState.FAILING, PrefillState.ENDED):
            self._send(self._outbox.once(self._farewell()))  # not acknowledged: an ended transfer is never revived
            return
        first = self._lease.until is None
        self._lease.extend(now, ttl_s)
        self._owed.owe(seq, now)
        if first and isinstance(body, Acquire):
            self._acquire = body
            if body.verify is not VerifyPages.OFF and not self._digest_block:
                told = "this prefill worker cannot compute them; set --verify-pages off on decode"
                self._refuse(FailureCode.MANIFEST, f"decode wants digests of pages ({body.verify}), and {told}", now)
                return
            if self.state is PrefillState.WAITING_ACQUIRE:
                self._start(now)
            else:
                self._request_by = now + ttl_s
        if self.state is not PrefillState.QUEUED or not isinstance(body, Acquire):
            self._acknowledge()  # else Granted may be as near as the engine's next turn

    def _acknowledge(self) -> None:
        for seq in self._owed.take():
            self._send(self._outbox.once(Ack(seq=seq)))

    def _outcome_of(self, body: Release | Cancel) -> Outcome:
        if isinstance(body, Cancel):
            return Outcome(body.code, body.message)
        if self.state is PrefillState.DONE:
            return Outcome()
        return Outcome(FailureCode.CANCELLED, "decode released the transfer before prefill had ended")

    def _farewell(self) -> Body:
        outcome = self.outcome or Outcome()
        return Failed(outcome.code or FailureCode.UNKNOWN_TRANSFER, outcome.message or "this transfer has ended")

    # ---- ends

    def _fail(self, code: FailureCode, message: str, now: float) -> None:
        """Give up. Pages that D may be reading stay; all else ends at once."""
        if self.state in (PrefillState.FAILING, PrefillState.ENDED):
            return
        if self.state in (PrefillState.PREFILLING, PrefillState.DONE):
            self.state = PrefillState.FAILING
            self._outbox.clear()
            self._put(Failed(code, message), now)
            self._settle(Outcome(code, message))
        else:
            self._refuse(code, message, now)

    def _refuse(self, code: FailureCode, message: str, now: float) -> None:
        self._outbox.clear()
        if self._lease.until is not None:
            self._put(Refused(code, message), now)
        self._end(Outcome(code, message), now)

    def _end(self, outcome: Outcome, now: float) -> None:
        holding = (PrefillState.QUEUED, PrefillState.PREFILLING, PrefillState.DONE, PrefillState.FAILING)
        if self.state in holding or (self._early is not None and self.state is PrefillState.WAITING_ACQUIRE):
            self._out.append(FreePages())
        for kind in (Granted, Watermark, Digests, Done):
            self._outbox.withdraw(kind)
        self._owed.take()  # how it ended is the answer
        self.state = PrefillState.ENDED
        horizon = self._policy.resend.horizon_s
        self._forget_at = max(now, self._deadline or now) + horizon
        self._settle(outcome)

    def _settle(self, outcome: Outcome) -> None:
        if self.outcome is None:
            self.outcome = outcome
            self._out.append(Report(outcome))

    def _put(self, body: Body, now: float) -> None:
        self._send(self._outbox.put(body, now))

    def _send(self, copy: Copy) -> None:
        self._out.append(Send(seq=copy.seq, body=copy.body))
