"""What happens to a session and what it wants done: every event and every instruction, as values.

A session's ``handle(event, now)`` returns instructions in the order in which they must be carried out. ``now`` is the
caller's clock (CLOCK_BOOTTIME in a daemon), in seconds; it never runs backwards.
"""

import msgspec

from pdkv.core.lease import LeasePolicy
from pdkv.core.residency import BlockRange
from pdkv.errors import FailureCode
from pdkv.schema import ALL_LAYERS, LayerRange, VerifyPages
from pdkv.wire.messages import Body
from pdkv.wire.outbox import ResendPolicy


class SessionPolicy(msgspec.Struct, frozen=True):
    lease: LeasePolicy = LeasePolicy()
    resend: ResendPolicy = ResendPolicy()
    close_grace_s: float = 1.0
    """How long D waits for outstanding reads of a failed transfer before the endpoint is closed by force."""
    layer_groups: tuple[int, ...] = (0,)
    """P: the first layer of each group whose pages may be read before those of later layers are written."""


class Outcome(msgspec.Struct, frozen=True):
    """How a transfer ended on one side. ``code`` is None when it went well."""

    code: FailureCode | None = None
    message: str = ""


# ---- events of both sides


class MessageArrived(msgspec.Struct, frozen=True):
    """A body from the peer; ``seq`` is the number of the copy, to be acknowledged."""

    seq: int
    body: Body


class Tick(msgspec.Struct, frozen=True):
    """Nothing but time."""


class PeerLost(msgspec.Struct, frozen=True):
    """The peer's incarnation has ended, or its endpoint is closed: nothing more comes from it."""

    message: str


class LocalFailure(msgspec.Struct, frozen=True):
    """This side gives up: client gone, engine refused, shutdown."""

    code: FailureCode
    message: str


# ---- events of a prefill session


class RequestArrived(msgspec.Struct, frozen=True):
    """The router's request, with the seconds it has left."""

    num_tokens: int
    deadline_s: float


class PagesReserved(msgspec.Struct, frozen=True):
    """The engine took pages for the prompt, in block order. It may do so as soon as the request is here; until
    ``StartPrefill`` it takes them back by itself when the outcome is reported."""

    pages: tuple[int, ...]
    cached_tokens: int


class Progressed(msgspec.Struct, frozen=True):
    """The kernels have finished that wrote the first ``tokens`` tokens of the first ``num_groups`` layer groups."""

    tokens: int
    num_groups: int | None = None
    """None = all."""


class Digested(msgspec.Struct, frozen=True):
    """What became of a ``Digest``, or of a part of its blocks: digests by rank, or why there are none."""

    blocks: BlockRange
    by_rank: tuple[bytes, ...]
    error: str = ""


class PrefillEnded(msgspec.Struct, frozen=True):
    token: int
    logprob: float
    attachment: bytes = b""
    """Goes to D with the first token, unread."""


# ---- events of a decode session


class ReadEnded(msgspec.Struct, frozen=True):
    """A posted read is over: nothing writes to its pages any more."""

    read: int
    ok: bool
    error: str = ""


class Checked(msgspec.Struct, frozen=True):
    """What became of a ``Check``. ``code`` is None when every digest was equal."""

    blocks: BlockRange
    code: FailureCode | None = None
    message: str = ""


# ---- instructions of both sides


class Send(msgspec.Struct, frozen=True):
    seq: int
    body: Body


class Report(msgspec.Struct, frozen=True):
    """The outcome, exactly once in a session's life; a failure may come before pages are given back."""

    outcome: Outcome


# ---- instructions of a prefill session


class StartPrefill(msgspec.Struct, frozen=True):
    """Both the request and the Acquire are here: queue it at the engine, if that has not begun already."""


class Digest(msgspec.Struct, frozen=True):
    """Compute the digests of ``blocks``, which nobody writes to any more, in ``pages`` (one a block); to be told as
    ``Digested``, in one part or several."""

    blocks: BlockRange
    pages: tuple[int, ...]
    verify: VerifyPages
    num_tokens: int
    """Of the whole prompt."""


class FreePages(msgspec.Struct, frozen=True):
    """Stop computing and give back every page: D reads none of them any more."""


# ---- instructions of a decode session


class Read(msgspec.Struct, frozen=True):
    """Post a read of ``blocks`` of ``layers`` now, from ``source_pages`` (one a block); its end is to be told as
    ``ReadEnded``."""

    read: int
    blocks: BlockRange
    source_pages: tuple[int, ...]
    layers: LayerRange = ALL_LAYERS


class Check(msgspec.Struct, frozen=True):
    """Compute the digests of ``blocks``, which have landed, and compare them with P's; to be told as ``Checked``."""

    blocks: BlockRange
    by_rank: tuple[bytes, ...]
    """P's, by its ranks."""


class Resume(msgspec.Struct, frozen=True):
    """Every block is resident: decoding may start from P's first token."""

    token: int
    logprob: float
    attachment: bytes = b""


class ReturnPages(msgspec.Struct, frozen=True):
    """The transfer failed and nothing writes into D's pages any more: they may be reused."""


class ClosePeer(msgspec.Struct, frozen=True):
    """Reads do not end by themselves: close the endpoint by force."""

    message: str


PrefillEvent = (
    MessageArrived
    | Tick
    | PeerLost
    | LocalFailure
    | RequestArrived
    | PagesReserved
    | Progressed
    | Digested
    | PrefillEnded
)
DecodeEvent = MessageArrived | Tick | PeerLost | LocalFailure | ReadEnded | Checked
PrefillInstruction = Send | Report | StartPrefill | Digest | FreePages
DecodeInstruction = Send | Report | Read | Check | Resume | ReturnPages | ClosePeer
