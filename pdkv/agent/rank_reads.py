"""One rank's half of D's links: it connects to P's ranks, proves the way, and reads its own spans.

Rank 0's agent directs all ranks by *orders* and hears of what became of them by *reports*. Both are messages, so a rank
may live in this process or in another: it runs the same code over its own transport, plan and probe pages.
"""

import time
from collections.abc import Sequence
from typing import Protocol

import msgspec

from pdkv.agent.paths import worst_path
from pdkv.core.plan import TransferPlan
from pdkv.errors import TransportError
from pdkv.schema import ALL_LAYERS, Incarnation, LayerRange, Manifest, ReadBatch, RegionKey
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.wire.messages import RankOffer

# ---- orders, from rank 0's agent to every rank of D


class ConnectLink(msgspec.Struct, frozen=True, tag="connect"):
    """Open the way to a P whose manifests fit. Answered by ``LinkConnected``."""

    link: int
    """Chosen by rank 0, never used again."""
    incarnation: int
    offers: tuple[RankOffer, ...]
    """All ranks of P, in order."""


class ProbeLink(msgspec.Struct, frozen=True, tag="probe"):
    """Read P's reserved pages into our own and check every byte. Answered by ``LinkProbed``; one at a time."""

    link: int


class ReadPages(msgspec.Struct, frozen=True, tag="read"):
    """Read ``layers`` of ``source_pages[i]`` of P into ``local_pages[i]``. Answered by ``PagesRead``."""

    link: int
    read: int
    """Chosen by rank 0, never used again."""
    source_pages: tuple[int, ...]
    local_pages: tuple[int, ...]
    layers: LayerRange = ALL_LAYERS


class CloseLink(msgspec.Struct, frozen=True, tag="close"):
    """Close every endpoint of the link by force. Not answered; what is under way ends with an error."""

    link: int


RankOrder = ConnectLink | ProbeLink | ReadPages | CloseLink

# ---- reports, from a rank to rank 0's agent


class LinkConnected(msgspec.Struct, frozen=True, tag="connected"):
    link: int
    num_regions: int
    """Regions (name, layer, head) that this rank reads of every page."""
    bytes_by_region: dict[str, int]
    """Bytes of one page by region name."""
    error: str = ""


class LinkProbed(msgspec.Struct, frozen=True, tag="probed"):
    link: int
    path: str
    """The worst of this rank's endpoints."""
    num_wrong: int
    """Regions that came over wrong."""
    first_wrong: str
    error: str = ""
    """Why the reads of the probe failed; empty when they did not."""
    note: str = ""
    """What the transport has to say beyond ``path``: staging, network cards."""


class PostedBatch(msgspec.Struct, frozen=True):
    """One batch of reads, to one rank of P."""

    num_spans: int
    post_s: float


class PagesRead(msgspec.Struct, frozen=True, tag="pages-read"):
    """All batches of a read are over: nothing of it lands any more. Without an error, every byte is there."""

    link: int
    read: int
    num_bytes: int
    batches: tuple[PostedBatch, ...]
    error: str = ""


RankReport = LinkConnected | LinkProbed | PagesRead


class Probe(Protocol):
    """The two reserved pages of a rank's arena. Implemented by ``pdkv.memory.probe.ProbePages``."""

    @property
    def pages(self) -> tuple[int, int]: ...

    def poison(self) -> None: ...

    def mismatches(self, peer: Incarnation, source_page: int, page: int) -> list[RegionKey]: ...


class _Link:
    """The endpoints to one life of one P."""

    def __init__(self, incarnation: Incarnation, plan: TransferPlan, peers: dict[int, PeerId]) -> None:
        self.incarnation = incarnation
        self.plan = plan
        self.peers = peers
        self._by_layers: dict[LayerRange, TransferPlan] = {}

    def plan_of(self, layers: LayerRange) -> TransferPlan:
        """Made once: P's layer groups are the same in every transfer."""
        if layers not in self._by_layers:
            self._by_layers[layers] = self.plan.of_layers(layers)
        return self._by_layers[layers]


class _Posted:
    """A read, or a probe, as many batches as ranks of P serve it."""

    def __init__(self, order: ReadPages | ProbeLink) -> None:
        self.order = order
        self.num_bytes = 0
        self.batches: list[PostedBatch] = []
        self.outstanding: set[ReadId] = set()
        self.error = ""


class RankReads:
    """One rank's endpoints and reads. Owned by that rank's agent thread, as are transport and probe pages.

    Every order but ``CloseLink`` is answered by exactly one report, at once or after completions.
    """

    def __init__(self, transport: Transport, manifest: Manifest, probe: Probe, bases: tuple[int, ...]) -> None:
        """``manifest``: of this rank. ``bases``: addresses of its registered memories, in that order."""
        self._transport = transport
        self._manifest = manifest
        self._probe = probe
        self._bases = bases
        self._links: dict[int, _Link] = {}
        self._posted: dict[ReadId, _Posted] = {}

    def obey(self, order: RankOrder) -> list[RankReport]:
        """Begin what is ordered; returns what can be told already."""
        match order:
            case ConnectLink():
                return [self._connect(order)]
            case ProbeLink():
                self._probe.poison()
                first, last = self._probe.pages
                return self._post(order, (0, self._source_pages(order.link) - 1), (last, first), ALL_LAYERS)
            case ReadPages():
                return self._post(order, order.source_pages, order.local_pages, order.layers)
            case CloseLink():
                link = self._links.pop(order.link, None)
                for peer in link.peers.values() if link else ():
                    self._transport.close_peer(peer)
                return []

    def on_completions(self, completions: Sequence[Completion]) -> list[RankReport]:
        """What the transport's ``poll`` returned; returns what has ended by it."""
        reports = []
        for completion in completions:
            posted = self._posted.pop(completion.read)
            posted.outstanding.discard(completion.read)
            if completion.status is not ReadStatus.OK:
                posted.error = completion.error or completion.status.value
            if not posted.outstanding:
                reports.append(self._ended(posted))
        return reports

    def widest_source(self, link: int) -> tuple[PeerId, int]:
        """Of a connected link: the rank of P that serves most bytes of a page, and how many; for those who measure."""
        known = self._links[link]
        served = dict.fromkeys(known.peers, 0)
        for piece in known.plan.pieces:
            served[piece.source_rank] += piece.length
        rank = max(served, key=lambda rank: served[rank])
        return known.peers[rank], served[rank]

    def _connect(self, order: ConnectLink) -> LinkConnected:
        plan = TransferPlan.between([offer.manifest for offer in order.offers], self._manifest)
        peers: dict[int, PeerId] = {}
        error = ""
        try:
            for rank in plan.source_ranks:
                peers[rank] = self._transport.connect(order.offers[rank].address)
        except TransportError as exc:
            error = str(exc)
        self._links[order.link] = _Link(Incarnation(order.incarnation), plan, peers)
        return LinkConnected(order.link, plan.num_regions, plan.bytes_by_region, error)

    def _source_pages(self, number: int) -> int:
        link = self._links.get(number)
        return link.plan.source_pages if link else 0

    def _post(
        self, order: ReadPages | ProbeLink, theirs: tuple[int, ...], ours: tuple[int, ...], layers: LayerRange
    ) -> list[RankReport]:
        posted = _Posted(order)
        link = self._links.get(order.link)
        if link is None:
            posted.error = "the link is closed"
            return [self._ended(posted)]
        try:
            batches = link.plan_of(layers).reads(theirs, ours, self._bases)
        except ValueError as exc:  # pages that P does not have: P is not to be believed
            posted.error = str(exc)
            return [self._ended(posted)]
        for rank, batch in batches.items():
            self._submit(posted, link.peers[rank], batch)
        return [] if posted.outstanding else [self._ended(posted)]

    def _submit(self, posted: _Posted, peer: PeerId, batch: ReadBatch) -> None:
        began = time.perf_counter()
        read = self._transport.submit(peer, batch)
        posted.batches.append(PostedBatch(batch.num_spans, time.perf_counter() - began))
        posted.num_bytes += batch.num_bytes
        posted.outstanding.add(read)
        self._posted[read] = posted

    def _ended(self, posted: _Posted) -> RankReport:
        order = posted.order
        if isinstance(order, ReadPages):
            return PagesRead(order.link, order.read, posted.num_bytes, tuple(posted.batches), posted.error)
        link = self._links.get(order.link)
        if posted.error or link is None:
            return LinkProbed(order.link, "unknown", 0, "", posted.error or "the link is closed")
        first, last = self._probe.pages
        wrong = [
            *self._probe.mismatches(link.incarnation, 0, last),
            *self._probe.mismatches(link.incarnation, link.plan.source_pages - 1, first),
        ]
        told = f"{wrong[0].name} of layer {wrong[0].layer} head {wrong[0].head}" if wrong else ""
        path = worst_path(self._transport.path(peer) for peer in link.peers.values())
        notes = {self._transport.note(peer) for peer in link.peers.values()} - {""}
        return LinkProbed(order.link, path, len(wrong), told, note="; ".join(sorted(notes)))
