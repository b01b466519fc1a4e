"""Lease arithmetic of both sides, without comparing clocks.

D counts from when it sent the copy that P acknowledged, P from when it received that copy, so P's count never ends
before D's, whatever the network delays.
"""

import msgspec


class LeasePolicy(msgspec.Struct, frozen=True):
    ttl_s: float = 10.0
    margin_s: float = 1.0
    """D stops reading this long before its own count ends."""
    renew_every_s: float = 2.5

    def __post_init__(self) -> None:
        if not 0 < self.margin_s < self.ttl_s:
            raise ValueError(f"lease margin {self.margin_s} s must lie between 0 and the ttl of {self.ttl_s} s")
        if not 0 < self.renew_every_s < self.ttl_s - self.margin_s:
            raise ValueError(f"renewing every {self.renew_every_s} s cannot keep a lease of {self.ttl_s} s alive")


class LeaseView(msgspec.Struct, frozen=True):
    """A lease that P has granted, as it is at one moment."""

    state: str
    """Of the session: "prefilling", "done", "failing"."""
    num_pages: int
    age_s: float
    """Since its pages were granted."""
    left_s: float
    """Until it ends, unless it is renewed before."""


class GrantedLease:
    """P's side: until when D may still read. Owned by a prefill session."""

    def __init__(self) -> None:
        self.until: float | None = None

    def extend(self, received_at: float, ttl_s: float) -> None:
        """An Acquire or Renew copy arrived. Late copies of old ones only ever lengthen it."""
        self.until = max(self.until or 0.0, received_at + ttl_s)

    def expired(self, now: float) -> bool:
        return self.until is not None and now >= self.until


class HeldLease:
    """D's side: until when reads may be posted and believed. Owned by a decode session."""

    def __init__(self, policy: LeasePolicy) -> None:
        self._policy = policy
        self.until: float | None = None
        """None until the first Acquire is acknowledged; the margin is taken off already."""

    def acknowledged(self, sent_at: float) -> None:
        """The copy sent at ``sent_at`` was acknowledged."""
        self.until = max(self.until or 0.0, sent_at + self._policy.ttl_s - self._policy.margin_s)

    def valid(self, now: float) -> bool:
        return self.until is not None and now < self.until

    def expired(self, now: float) -> bool:
        return self.until is not None and now >= self.until
