"""D's links to prefill workers: greeting, comparison of manifests, and the probe that proves the path.

GREETING --Welcome--> CONNECTING (all ranks) --> WAITING (for its turn) --> PROBING --every byte right--> READY
    anything wrong, at any time: LOST, final; the next transfer to that worker makes a new link

A P that is no more would leave its memory mapped here. So an idle link asks now and then whether P is still there.
"""

import logging
from enum import Enum

from pdkv.agent.events import PeerFacts, WorkerIdentity
from pdkv.agent.lives import Lives
from pdkv.agent.meter import AgentMeter
from pdkv.agent.paths import PathRequirement
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import LinkConnected, LinkProbed
from pdkv.core.manifest import check_pairing
from pdkv.errors import FailureCode, HandshakeError
from pdkv.schema import PROTOCOL_VERSION, Incarnation, Manifest
from pdkv.wire.admission import Refused
from pdkv.wire.channel import Channel, Received, Route
from pdkv.wire.messages import NO_TRANSFER, Gone, Hello, OtherVersion, Reject, Welcome, make_envelope
from pdkv.wire.outbox import Outbox, ResendPolicy

_LOG = logging.getLogger("pdkv.agent")
HANDSHAKE_S = 10.0
"""A link that is not READY so long after its first Hello is LOST."""
ASK_EVERY_S = 20.0
"""A READY link that has heard nothing of its P for so long greets it again."""
SILENCE_S = 65.0
"""And is LOST when three such greetings were not answered."""
_GREETING = ResendPolicy(first_s=0.03, factor=1.6, longest_s=0.5, horizon_s=HANDSHAKE_S)


class LinkState(Enum):
    GREETING = "greeting"
    CONNECTING = "connecting"
    WAITING = "waiting"
    PROBING = "probing"
    READY = "ready"
    LOST = "lost"


class PeerLink:
    """One life of one prefill worker, as D knows it. Changed by ``PeerLinks`` only."""

    def __init__(self, control: str, incarnation: Incarnation, route: Route, at: float) -> None:
        self.control = control
        self.incarnation = incarnation
        self.route = route
        self.state = LinkState.GREETING
        self.name = control
        self.error = HandshakeError(FailureCode.PEER_LOST, f"prefill worker {control} is gone")
        self.path = "unknown"
        self.note = ""
        """What the transport says of the way beyond ``path``."""
        self.probe_gbps = 0.0
        self.started = at
        self.deadline = at + HANDSHAKE_S
        self.outbox = Outbox(_GREETING)
        self.number: int | None = None
        """What the ranks call it, from CONNECTING on."""
        self.manifests: tuple[Manifest, ...] = ()
        """Of all ranks of P, from CONNECTING on."""
        self.num_regions = 0
        self.bytes_by_region: dict[str, int] = {}
        """Bytes of one page over all ranks, by region name."""
        self.probe_started = 0.0
        self.heard = at
        """When P last said anything that concerns the link."""
        self.asked = at
        """When P was last asked to."""

    @property
    def next_question(self) -> float:
        return min(max(self.heard, self.asked) + ASK_EVERY_S, self.heard + SILENCE_S)

    def facts(self) -> PeerFacts:
        return PeerFacts(self.control, self.incarnation, self.state.value, self.path, self.probe_gbps, self.note)


class PeerLinks:
    """Every link of one D. Owned by the agent thread; tells what became of links by the lists it returns."""

    def __init__(
        self, identity: WorkerIdentity, channel: Channel, ranks: RankGroup, requirement: PathRequirement
    ) -> None:
        self.meter = AgentMeter()
        """The whole agent's: links and transfers are counted in the same thread."""
        self._identity = identity
        self._channel = channel
        self._ranks = ranks
        self._requirement = requirement
        self._links: dict[tuple[str, Incarnation], PeerLink] = {}
        self._probing: PeerLink | None = None
        """Until every rank's reads of the probe have ended, even when the link is lost before: there is one pair of
        pages for all links."""
        self._changed: list[PeerLink] = []
        self._lives = Lives()

    def get(self, control: str, incarnation: Incarnation, at: float) -> PeerLink:
        """The link to one life of a worker, greeted now if it is new. Raises ``ConfigError`` for a bad endpoint."""
        link = self._links.get((control, incarnation))
        if link is None:
            link = PeerLink(control, incarnation, self._route(control), at)
            self._links[control, incarnation] = link
            hello = link.outbox.put(self._hello(), at)
            self._send(link, hello.seq, hello.body)
        return link

    def on_message(self, received: Received, at: float) -> None:
        """A message between workers. Those of transfers are not for here."""
        body = received.body
        told_of = body.incarnation if isinstance(body, Gone) else received.envelope.sender
        link = next((k for k in self._links.values() if k.route == received.route and k.incarnation == told_of), None)
        if link is None:
            return
        link.heard = at
        match body:
            case Welcome() if link.state is LinkState.GREETING:
                self._on_welcome(link, body)
            case Reject(code=code, message=message) if link.state is LinkState.GREETING:
                self.lose(link, HandshakeError(code, f"prefill worker {link.control} refused the handshake: {message}"))
            case OtherVersion(version=version):
                told = f"prefill worker {link.control} speaks protocol {version}, this worker {PROTOCOL_VERSION}"
                self.lose(link, HandshakeError(FailureCode.MANIFEST, told))
            case Gone():
                told = f"prefill worker {link.control} has ended or was restarted"
                self.lose(link, HandshakeError(FailureCode.PEER_LOST, told))
            case _:
                pass

    def on_refused(self, refused: Refused) -> None:
        """The connection of these links will not stand any more; the next transfer makes a new one."""
        for link in [k for k in self._links.values() if not k.route.incoming and k.route.key == refused.dealer]:
            self.lose(link, HandshakeError(FailureCode.KEYS, refused.message))

    def on_connected(self, report: LinkConnected) -> None:
        """Every rank has its endpoints."""
        link = self._numbered(report.link)
        if link is None:
            return
        if report.error:
            told = f"cannot reach {link.control}: {report.error}"
            self.lose(link, HandshakeError(FailureCode.PEER_LOST, told))
            return
        link.num_regions, link.bytes_by_region = report.num_regions, report.bytes_by_region
        link.state = LinkState.WAITING

    def on_probed(self, report: LinkProbed, at: float) -> None:
        """Every rank has read P's reserved pages, or cannot."""
        self._probing = None
        link = self._numbered(report.link)
        if link is None:
            return
        link.path, link.note = report.path, report.note
        if report.error:
            told = f"probe of {link.control} failed: {report.error}"
        elif report.num_wrong:
            wrong = f"{report.num_wrong} regions came over wrong, first {report.first_wrong}"
            told = f"probe of {link.control} over {link.path}: {wrong}"
        elif not self._requirement.allows(link.path):
            told = f"the path to {link.control} is {link.path}, but {self._requirement.least} is required"
        else:
            self._on_proven(link, at)
            return
        self.lose(link, HandshakeError(FailureCode.PROBE, told))

    def on_time(self, at: float) -> None:
        for link in list(self._links.values()):
            if link.state is LinkState.READY:
                self._ask_after(link, at)
                continue
            if at >= link.deadline:
                told = (
                    f"no handshake with prefill worker {link.control} within {HANDSHAKE_S:.0f} s ({link.state.value})"
                )
                self.lose(link, HandshakeError(FailureCode.PEER_LOST, told))
                continue
            for copy in link.outbox.due(at):
                self._send(link, copy.seq, copy.body)
        if self._probing is None:
            waiting = [link for link in self._links.values() if link.state is LinkState.WAITING]
            if waiting:
                self._start_probe(waiting[0], at)

    def next_wakeup(self) -> float | None:
        times = []
        for link in self._links.values():
            if link.state is LinkState.READY:
                times.append(link.next_question)
            else:
                times += [link.deadline, link.outbox.next_due() or link.deadline]
        return min(times, default=None)

    def take_changed(self) -> list[PeerLink]:
        """Links that became READY or LOST since the last call."""
        changed, self._changed = self._changed, []
        return changed

    def lose(self, link: PeerLink, error: HandshakeError) -> None:
        """End a link: its endpoints are closed by force, its connection too. Harmless for one that has ended."""
        if link.state is LinkState.LOST:
            return
        _LOG.warning("link to prefill worker lost: %s", error)
        if link.state is LinkState.READY:
            self.meter.lost(error.code)
        else:
            self.meter.refused(error.code)
        link.state = LinkState.LOST
        link.error = error
        if link.number is not None:
            self._ranks.close(link.number)
        del self._links[link.control, link.incarnation]
        if not any(other.control == link.control for other in self._links.values()):
            self._channel.disconnect(link.route)
        self._changed.append(link)

    def farewell(self) -> None:
        """Tell every P that this life ends, so that none keeps it in mind; the last call."""
        for link in self._links.values():
            self._send(link, 0, Gone(incarnation=self._identity.incarnation))

    def silence_s(self, at: float) -> float:
        """Since that P which has been silent longest said anything that concerns its link."""
        return max((at - link.heard for link in self._links.values() if link.state is LinkState.READY), default=0.0)

    def facts(self) -> tuple[PeerFacts, ...]:
        return tuple(link.facts() for link in self._links.values())

    def _route(self, control: str) -> Route:
        """One connection an address, whichever lives are behind it: P tells connections apart by our incarnation."""
        known = (link.route for link in self._links.values() if link.control == control)
        return next(known, None) or self._channel.connect(control)

    def _on_welcome(self, link: PeerLink, welcome: Welcome) -> None:
        link.outbox.clear()
        try:
            check_pairing([offer.manifest for offer in welcome.ranks], self._identity.manifests)
        except HandshakeError as exc:
            self.lose(link, exc)
            return
        link.name = welcome.name
        link.manifests = tuple(offer.manifest for offer in welcome.ranks)
        link.state = LinkState.CONNECTING
        link.number = self._ranks.connect(link.incarnation, welcome.ranks)

    def _ask_after(self, link: PeerLink, at: float) -> None:
        """Whether P is still there. It answers every greeting with a welcome, and one to an earlier life with Gone."""
        if at >= link.heard + SILENCE_S:
            told = f"prefill worker {link.control} has said nothing for {at - link.heard:.0f} s"
            self.lose(link, HandshakeError(FailureCode.PEER_LOST, told))
        elif at >= link.next_question:
            link.asked = at
            self._send(link, 0, self._hello())

    def _hello(self) -> Hello:
        return Hello(name=self._identity.name, ranks=self._identity.offers)

    def _start_probe(self, link: PeerLink, at: float) -> None:
        """Each rank reads P's two reserved pages crosswise into its own, exactly as its plan reads any page."""
        assert link.number is not None, "a link that waits is connected"
        self._probing = link
        link.state = LinkState.PROBING
        link.probe_started = at
        self._ranks.probe(link.number)

    def _on_proven(self, link: PeerLink, at: float) -> None:
        for old in [o for o in self._links.values() if o.control == link.control and o is not link]:
            told = f"prefill worker {old.control} was restarted"
            self.lose(old, HandshakeError(FailureCode.PEER_LOST, told))
        num_bytes = 2 * sum(link.bytes_by_region.values())
        link.probe_gbps = num_bytes / max(at - link.probe_started, 1e-9) / 1e9
        link.state = LinkState.READY
        link.heard = link.asked = at
        self.meter.welcomed(at - link.started)
        if self._lives.is_another(link.control, link.incarnation):
            self.meter.returned()
        self._changed.append(link)
        over = f"{link.path} ({link.note})" if link.note else link.path
        _LOG.info("link to prefill worker %s ready over %s, probe at %.2f GB/s", link.name, over, link.probe_gbps)

    def _numbered(self, number: int) -> PeerLink | None:
        """The link that the ranks know by ``number``; None when it is lost."""
        return next((link for link in self._links.values() if link.number == number), None)

    def _send(self, link: PeerLink, seq: int, body: object) -> None:
        assert isinstance(body, Hello | Gone)
        identity = self._identity
        envelope = make_envelope(identity.incarnation, link.incarnation, NO_TRANSFER, seq, identity.digest)
        self._channel.send(link.route, envelope, body)
