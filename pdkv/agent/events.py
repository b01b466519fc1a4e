"""Commands to the agent thread and events from it: what an engine and its agent say to each other, through queues."""

from collections.abc import Callable

import msgspec

from pdkv.agent.rank_digests import PagesDigested
from pdkv.agent.rank_reads import RankReport
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeaseView
from pdkv.errors import FailureCode
from pdkv.metrics import Series
from pdkv.schema import Incarnation, Manifest, TransferId
from pdkv.wire.messages import RankOffer


class WorkerIdentity(msgspec.Struct, frozen=True):
    """Who this worker is to its peers."""

    name: str
    """Stable over restarts: a new incarnation of a name ends the old one."""
    incarnation: Incarnation
    offers: tuple[RankOffer, ...]
    """Of all its ranks, in order."""
    digest: str
    """Pairing digest of their manifests."""
    policy: SessionPolicy

    @property
    def manifests(self) -> tuple[Manifest, ...]:
        return tuple(offer.manifest for offer in self.offers)

    @property
    def manifest(self) -> Manifest:
        """Rank 0's: what all ranks have in common is in it."""
        return self.offers[0].manifest


# ---- commands to P's agent


class ExpectTransfer(msgspec.Struct, frozen=True):
    """The router's request has come."""

    transfer: TransferId
    num_tokens: int
    deadline_s: float


class GrantPages(msgspec.Struct, frozen=True):
    transfer: TransferId
    pages: tuple[int, ...]
    cached_tokens: int


class RaiseWatermark(msgspec.Struct, frozen=True):
    transfer: TransferId
    tokens: int
    at: float = 0.0
    """When the kernels had ended, by the agent's clock; 0 = not told."""
    num_groups: int | None = None
    """Of the first so many layer groups; None = of all."""


class FinishPrefill(msgspec.Struct, frozen=True):
    transfer: TransferId
    token: int
    logprob: float
    attachment: bytes = b""
    """At most ``MAX_ATTACHMENT_BYTES``."""
    at: float = 0.0
    """When the first token was known, by the agent's clock; 0 = not told."""


class AbandonTransfer(msgspec.Struct, frozen=True):
    """This side gives up: client gone, engine refused, deadline. Used by both roles."""

    transfer: TransferId
    code: FailureCode
    message: str


class Inspect(msgspec.Struct, frozen=True):
    """Ask for ``AgentStatistics``; ``answer`` is called from the agent thread. Used by both roles."""

    answer: "Callable[[AgentStatistics], None]"


class RankReported(msgspec.Struct, frozen=True):
    """What a rank of this worker has to say. Used by both roles; of reads by decode, and of ranks other than 0."""

    rank: int
    report: RankReport | PagesDigested


PrefillCommand = ExpectTransfer | GrantPages | RaiseWatermark | FinishPrefill | AbandonTransfer | Inspect | RankReported

# ---- events of P's agent


class PrefillWanted(msgspec.Struct, frozen=True):
    """Request and Acquire are both here: compute, unless that is under way. From here on D may read."""

    transfer: TransferId


class PagesFreed(msgspec.Struct, frozen=True):
    """Stop computing, take the pages back: nobody reads them."""

    transfer: TransferId


class TransferEnded(msgspec.Struct, frozen=True):
    """The outcome; ``code`` is None when D has taken everything. Pages may still be held: ``PagesFreed`` tells."""

    transfer: TransferId
    code: FailureCode | None
    message: str


PrefillAgentEvent = PrefillWanted | PagesFreed | TransferEnded

# ---- commands to D's agent


class StartTransfer(msgspec.Struct, frozen=True):
    """Fetch the state of a prompt into ``pages``, one a block in block order, reserved for it."""

    transfer: TransferId
    control: str
    incarnation: Incarnation
    pages: tuple[int, ...]
    num_tokens: int
    deadline_s: float
    resident_blocks: int = 0
    """Leading blocks whose pages hold their state already: they are not read."""


DecodeCommand = StartTransfer | AbandonTransfer | Inspect | RankReported

# ---- events of D's agent


class TransferFacts(msgspec.Struct, frozen=True):
    """What one transfer took."""

    num_pages: int
    """Pages that were read."""
    num_regions: int
    num_spans: int
    num_bytes: int
    bytes_by_region: dict[str, int]
    bytes_before_done: int
    read_s: float
    total_s: float
    path: str
    peer: str
    cached_tokens: int = 0
    """Prompt tokens that P did not have to compute."""
    resident_pages: int = 0
    """Pages that were here before."""
    exposed_s: float = 0.0
    """From P's Done to the last byte: what of the move was not hidden behind prefill. 0 when all had landed."""
    hidden_fraction: float = 0.0
    """Share of the bytes that had landed when Done came."""
    granted_s: float = 0.0
    """From Acquire to Granted: P's queue included."""
    posted_s: float = 0.0
    """Longest time from a message that allowed reads to their being posted."""
    compared_s: float = 0.0
    """From the last byte, or Done where that came later, to the last digest that was equal; 0 where none are compared.
    """
    resident_at: float = 0.0
    """When everything was there, by the agent's clock."""


class TransferArrived(msgspec.Struct, frozen=True):
    """Everything is resident: decode from P's first token."""

    transfer: TransferId
    token: int
    logprob: float
    facts: TransferFacts
    attachment: bytes = b""


class TransferFailed(msgspec.Struct, frozen=True):
    """It will not arrive. The pages are still being written to, until ``PagesReturned``."""

    transfer: TransferId
    code: FailureCode
    message: str


class PagesReturned(msgspec.Struct, frozen=True):
    """Nothing writes into the pages of a failed transfer any more."""

    transfer: TransferId


DecodeAgentEvent = TransferArrived | TransferFailed | PagesReturned


# ---- both


class PeerFacts(msgspec.Struct, frozen=True):
    control: str
    incarnation: Incarnation
    state: str
    path: str
    probe_gbps: float
    note: str = ""
    """What the transport says of the way beyond ``path``: "staged through pinned host memory"."""


class LeaseFacts(msgspec.Struct, frozen=True):
    """A lease that P has granted."""

    transfer: TransferId
    peer: str
    """Name of the decode worker that holds it."""
    view: LeaseView


class AgentStatistics(msgspec.Struct, frozen=True):
    transfers_open: int
    leases_active: int
    reads_outstanding: int
    messages_dropped: int
    peers: tuple[PeerFacts, ...]
    series: tuple[Series, ...] = ()
    """What has been counted."""
    leases: tuple[LeaseFacts, ...] = ()
    pages_stranded: int = 0
    """Of transfers that have failed: they come back when nothing can read or write them any more."""
    silence_s: float = 0.0
    """Since that ready peer which has been silent longest said anything."""
