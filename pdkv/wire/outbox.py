"""Messages that must arrive: kept and re-sent until acknowledged. Pure: the caller brings the time."""

import msgspec

from pdkv.wire.messages import Body


class Copy(msgspec.Struct, frozen=True):
    """One copy to put on the wire now."""

    seq: int
    body: Body


class Acknowledged(msgspec.Struct, frozen=True):
    body: Body
    sent_at: float
    """When the acknowledged copy was sent, in the caller's clock: leases are counted from here."""


class ResendPolicy(msgspec.Struct, frozen=True):
    first_s: float = 0.2
    factor: float = 2.0
    longest_s: float = 2.0
    horizon_s: float = 30.0
    """A message that nobody acknowledged for so long is given up."""

    @property
    def owe_s(self) -> float:
        """How long an acknowledgement may wait for company: short of half of what its sender waits, so that there is
        time for the way there and back too."""
        return 0.4 * self.first_s


class _Pending:
    def __init__(self, body: Body, now: float, wait_s: float) -> None:
        self.body = body
        self.first_sent_at = now
        self.wait_s = wait_s
        self.due_at = now + wait_s
        self.copies: dict[int, float] = {}


class Outbox:
    """The unacknowledged messages of one conversation; one per kind of message, the newest replaces an older one.

    Owned by the session that fills it.
    """

    def __init__(self, policy: ResendPolicy) -> None:
        self._policy = policy
        self._pending: dict[type[Body], _Pending] = {}
        self._next_seq = 1

    def __len__(self) -> int:
        return len(self._pending)

    def put(self, body: Body, now: float) -> Copy:
        """Keep ``body`` until acknowledged, instead of any older one of its kind; returns the first copy."""
        pending = _Pending(body, now, self._policy.first_s)
        self._pending[type(body)] = pending
        return self._copy(pending, now)

    def once(self, body: Body) -> Copy:
        """A copy that is not kept: acknowledgements and answers to late messages."""
        seq = self._next_seq
        self._next_seq += 1
        return Copy(seq=seq, body=body)

    def acknowledge(self, seq: int) -> Acknowledged | None:
        """Settle the message that copy ``seq`` belongs to. None for copies unknown, superseded or settled before."""
        for kind, pending in self._pending.items():
            sent_at = pending.copies.get(seq)
            if sent_at is not None:
                del self._pending[kind]
                return Acknowledged(body=pending.body, sent_at=sent_at)
        return None

    def holds(self, kind: type[Body]) -> bool:
        return kind in self._pending

    def withdraw(self, kind: type[Body]) -> None:
        self._pending.pop(kind, None)

    def clear(self) -> None:
        self._pending.clear()

    def due(self, now: float) -> list[Copy]:
        """Fresh copies of everything whose wait is over; messages past the horizon are dropped."""
        copies = []
        for kind, pending in list(self._pending.items()):
            if now - pending.first_sent_at >= self._policy.horizon_s:
                del self._pending[kind]
            elif now >= pending.due_at:
                pending.wait_s = min(pending.wait_s * self._policy.factor, self._policy.longest_s)
                pending.due_at = now + pending.wait_s
                copies.append(self._copy(pending, now))
        return copies

    def next_due(self) -> float | None:
        return min((pending.due_at for pending in self._pending.values()), default=None)

    def _copy(self, pending: _Pending, now: float) -> Copy:
        copy = self.once(pending.body)
        pending.copies[copy.seq] = now
        return copy


class OwedAcks:
    """Copies that are to be acknowledged, but not at once: with the next message, or when ``due``. One that says as
    much spares them. Owned by the session that owes.

    Every message wakes two threads on both sides, and nobody waits for an acknowledgement that comes in time.
    """

    def __init__(self, policy: ResendPolicy) -> None:
        self._policy = policy
        self._seqs: list[int] = []
        self.due: float | None = None
        """When all of them must leave; None while there are none."""

    def owe(self, seq: int, now: float) -> None:
        """Copy ``seq`` has come."""
        self._seqs.append(seq)
        if self.due is None:
            self.due = now + self._policy.owe_s

    def take(self) -> list[int]:
        """Whatever is owed, oldest first: the caller sends it, or something that spares it."""
        seqs, self._seqs, self.due = self._seqs, [], None
        return seqs
