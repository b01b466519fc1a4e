"""P's agent: greets decode workers, and carries out what prefill sessions decide."""

import logging
from collections.abc import Callable, Sequence

import msgspec

from pdkv.agent.appointments import Appointments
from pdkv.agent.digest_group import DigestGroup, WantedDigests
from pdkv.agent.events import (
    AbandonTransfer,
    AgentStatistics,
    ExpectTransfer,
    FinishPrefill,
    GrantPages,
    Inspect,
    LeaseFacts,
    PagesFreed,
    PeerFacts,
    PrefillAgentEvent,
    PrefillCommand,
    PrefillWanted,
    RaiseWatermark,
    RankReported,
    TransferEnded,
    WorkerIdentity,
)
from pdkv.agent.lives import Lives
from pdkv.agent.loop import Agent, now
from pdkv.agent.meter import AgentMeter
from pdkv.agent.peer_links import SILENCE_S
from pdkv.agent.rank_digests import PagesDigested
from pdkv.core.digests import DIGEST_BYTES
from pdkv.core.events import (
    Digest,
    Digested,
    FreePages,
    LocalFailure,
    MessageArrived,
    PagesReserved,
    PeerLost,
    PrefillEnded,
    PrefillEvent,
    Progressed,
    Report,
    RequestArrived,
    Send,
    StartPrefill,
    Tick,
)
from pdkv.core.manifest import check_pairing
from pdkv.core.prefill_session import PrefillSession, PrefillState
from pdkv.core.residency import BlockRange
from pdkv.errors import FailureCode, HandshakeError
from pdkv.schema import PROTOCOL_VERSION, Incarnation, TransferId
from pdkv.transport.base import Completion
from pdkv.wire.admission import Refused
from pdkv.wire.channel import Channel, Received, Route
from pdkv.wire.messages import (
    NO_TRANSFER,
    Acquire,
    Body,
    Cancel,
    Failed,
    Gone,
    Hello,
    OtherVersion,
    Reject,
    Release,
    Renew,
    Welcome,
    make_envelope,
)

_LOG = logging.getLogger("pdkv.agent")
_DIGESTS_AT_ONCE = 1 << 20
"""Bytes of digests in one message: the first blocks are compared while the next are digested."""


class _Peer(msgspec.Struct, frozen=True):
    """A decode worker that was welcomed."""

    name: str
    incarnation: Incarnation
    route: Route


class _Transfer:
    def __init__(self, session: PrefillSession) -> None:
        self.session = session
        self.peer: _Peer | None = None


class PrefillAgent(Agent[PrefillCommand]):
    """Owned by the agent thread. ``emit`` is called from it; it must only queue."""

    def __init__(
        self,
        identity: WorkerIdentity,
        channel: Channel,
        emit: Callable[[PrefillAgentEvent], None],
        digests: DigestGroup[tuple[TransferId, BlockRange]] | None = None,
    ) -> None:
        """``digests``: of this worker's pages; without, transfers that want some are refused."""
        self._identity = identity
        self._channel = channel
        self._emit = emit
        self._digests = digests
        self._meter = AgentMeter()
        self._peers: dict[Incarnation, _Peer] = {}
        self._heard: dict[Incarnation, float] = {}
        """When each of them last said anything. A decode worker asks after P every 20 s."""
        self._lives = Lives()
        self._transfers: dict[TransferId, _Transfer] = {}
        self._appointments: Appointments[TransferId] = Appointments()

    # ---- what happens

    def on_command(self, command: PrefillCommand, at: float) -> None:
        match command:
            case Inspect(answer=answer):
                answer(self._statistics(at))
            case ExpectTransfer(transfer=transfer_id, num_tokens=num_tokens, deadline_s=deadline_s):
                self._on_expected(transfer_id, num_tokens, deadline_s, at)
            case GrantPages(transfer=transfer, pages=pages, cached_tokens=cached):
                self._tell(transfer, PagesReserved(pages, cached), at)
            case RaiseWatermark(transfer=transfer, tokens=tokens, num_groups=num_groups):
                self._tell(transfer, Progressed(tokens, num_groups), at)
                self._published(command.at)
            case FinishPrefill(transfer=transfer, token=token, logprob=logprob, attachment=attachment):
                self._tell(transfer, PrefillEnded(token, logprob, attachment), at)
                self._published(command.at)
            case AbandonTransfer(transfer=transfer, code=code, message=message):
                self._tell(transfer, LocalFailure(code, message), at)
            case RankReported(rank=rank, report=report):
                assert isinstance(report, PagesDigested), "P's ranks read nothing"
                self._on_rank_digested(rank, report, at)

    def on_message(self, received: Received, at: float) -> None:
        envelope, body = received.envelope, received.body
        if isinstance(body, OtherVersion):
            told = f"prefill speaks protocol {PROTOCOL_VERSION}, decode {body.version}; run the same version on both"
            self._reply(received, Reject(code=FailureCode.MANIFEST, message=told), NO_TRANSFER)
            return
        if envelope.addressee != self._identity.incarnation:
            self._reply(received, Gone(incarnation=envelope.addressee), NO_TRANSFER)
            return
        if envelope.sender in self._peers:
            self._heard[Incarnation(envelope.sender)] = at
        if envelope.transfer == NO_TRANSFER:
            if isinstance(body, Hello):
                self._on_hello(received, body, at)
            elif isinstance(body, Gone) and body.incarnation == envelope.sender:
                self._end_life(Incarnation(body.incarnation), FailureCode.SHUTDOWN, "has ended", at)
            else:
                self._channel.drop(f"{type(body).__name__} without a transfer")
            return
        peer = self._peers.get(Incarnation(envelope.sender))
        if peer is None:
            self._channel.drop(f"incarnation {envelope.sender:016x} has not said Hello")
            return
        self._on_transfer_message(received, body, peer, at)

    def on_refused(self, refused: Refused, at: float) -> None:  # noqa: ARG002
        self._meter.kept_out(refused.reason)

    def on_completions(self, completions: Sequence[Completion], at: float) -> None:
        """P reads nothing."""

    def on_time(self, at: float) -> None:
        for transfer_id in self._appointments.take_due(at):
            transfer = self._transfers[transfer_id]
            if transfer.session.forgettable(at):
                del self._transfers[transfer_id]
            else:
                self._handle(transfer_id, transfer, Tick(), at)

    def next_wakeup(self) -> float | None:
        return self._appointments.next_time()

    def close(self, at: float) -> None:
        for transfer_id, transfer in list(self._transfers.items()):
            failure = LocalFailure(FailureCode.SHUTDOWN, "prefill worker is shutting down")
            self._handle(transfer_id, transfer, failure, at)
        ours = self._identity.incarnation
        for peer in self._peers.values():  # none shall keep this life's memory mapped
            envelope = make_envelope(ours, peer.incarnation, NO_TRANSFER, 0, self._identity.digest)
            self._channel.send(peer.route, envelope, Gone(incarnation=ours))
        if self._digests is not None:
            self._digests.close()

    # ---- decode workers

    def _on_hello(self, received: Received, hello: Hello, at: float) -> None:
        try:
            if received.envelope.digest != self._identity.digest:
                check_pairing(self._identity.manifests, [offer.manifest for offer in hello.ranks])
        except HandshakeError as exc:
            _LOG.warning("decode worker %s refused: %s", hello.name, exc)
            self._meter.refused(exc.code)
            self._reply(received, Reject(code=exc.code, message=str(exc)), NO_TRANSFER)
            return
        peer = _Peer(hello.name, Incarnation(received.envelope.sender), received.route)
        if peer.incarnation not in self._peers:
            self._end_older_lives(peer, at)
            self._peers[peer.incarnation] = peer
            self._heard[peer.incarnation] = at
            self._meter.welcomed()
            if self._lives.is_another(peer.name, peer.incarnation):
                self._meter.returned()
            _LOG.info("decode worker %s welcomed, incarnation %016x", peer.name, peer.incarnation)
        self._reply(received, Welcome(name=self._identity.name, ranks=self._identity.offers), NO_TRANSFER)

    def _end_older_lives(self, peer: _Peer, at: float) -> None:
        for old in [p for p in self._peers.values() if p.name == peer.name]:
            self._end_life(old.incarnation, FailureCode.PEER_LOST, "was restarted", at)

    def _end_life(self, incarnation: Incarnation, code: FailureCode, how: str, at: float) -> None:
        """A decode worker that is no more reads nothing: its transfers end, its pages come back."""
        old = self._peers.pop(incarnation, None)
        if old is None:
            return
        del self._heard[incarnation]
        self._meter.lost(code)
        _LOG.info("decode worker %s %s, incarnation %016x", old.name, how, incarnation)
        lost = PeerLost(f"decode worker {old.name} {how}")
        for transfer_id, transfer in list(self._transfers.items()):
            if transfer.peer == old:
                self._handle(transfer_id, transfer, lost, at)

    # ---- transfers

    def _on_expected(self, transfer_id: TransferId, num_tokens: int, deadline_s: float, at: float) -> None:
        transfer = self._transfers.setdefault(transfer_id, _Transfer(self._new_session()))
        outcome = transfer.session.outcome
        if transfer.session.state is PrefillState.ENDED and outcome is not None:
            code = outcome.code or FailureCode.UNKNOWN_TRANSFER
            self._emit(TransferEnded(transfer_id, code, outcome.message or "this transfer has ended"))
            return
        self._handle(transfer_id, transfer, RequestArrived(num_tokens, deadline_s), at)

    def _new_session(self) -> PrefillSession:
        block_size = self._identity.manifest.block_size
        return PrefillSession(self._identity.policy, block_size if self._digests is not None else 0)

    def _on_transfer_message(self, received: Received, body: Body, peer: _Peer, at: float) -> None:
        transfer_id = TransferId(received.envelope.transfer)
        transfer = self._transfers.get(transfer_id)
        if transfer is None:
            if not isinstance(body, Acquire | Cancel | Release):
                if isinstance(body, Renew):
                    unknown = Failed(FailureCode.UNKNOWN_TRANSFER, "no such transfer here")
                    self._reply(received, unknown, transfer_id)
                return
            transfer = self._transfers[transfer_id] = _Transfer(self._new_session())
        if transfer.peer is None:
            transfer.peer = peer
        elif transfer.peer.incarnation != peer.incarnation:
            self._channel.drop(f"transfer {transfer_id.hex()} belongs to another decode worker")
            return
        self._handle(transfer_id, transfer, MessageArrived(received.envelope.seq, body), at)

    def _tell(self, transfer_id: TransferId, event: PrefillEvent, at: float) -> None:
        transfer = self._transfers.get(transfer_id)
        if transfer is not None:
            self._handle(transfer_id, transfer, event, at)

    def _handle(self, transfer_id: TransferId, transfer: _Transfer, event: PrefillEvent, at: float) -> None:
        had_expired, had_lease = transfer.session.lease_expired, transfer.session.holds_lease
        instructions = transfer.session.handle(event, at)
        self._appointments.set(transfer_id, transfer.session.next_wakeup())
        if transfer.session.lease_expired and not had_expired:
            self._meter.lease_expired()
        if had_lease and not transfer.session.holds_lease:
            self._meter.lease_ended(at - transfer.session.granted_at)
        for instruction in instructions:
            match instruction:
                case Send(seq=seq, body=body):
                    self._send(transfer, transfer_id, seq, body)
                case StartPrefill():
                    self._emit(PrefillWanted(transfer_id))
                case Digest():
                    self._digest(transfer_id, instruction)
                case FreePages():
                    if transfer.session.state is PrefillState.WAITING_ACQUIRE:  # it goes on, and may begin anew
                        self._meter.discarded()
                    self._emit(PagesFreed(transfer_id))
                case Report(outcome=outcome):
                    self._emit(TransferEnded(transfer_id, outcome.code, outcome.message))

    def _digest(self, transfer_id: TransferId, asked: Digest) -> None:
        """In runs of blocks whose digests fit into a message."""
        assert self._digests is not None, "the session knows what this worker can"
        regions = [region for manifest in self._identity.manifests for region in manifest.regions]
        at_once = max(1, _DIGESTS_AT_ONCE // (DIGEST_BYTES * sum(region.num_heads for region in regions)))
        for begin in range(0, len(asked.pages), at_once):
            pages = asked.pages[begin : begin + at_once]
            start = asked.blocks.start + begin
            blocks = BlockRange(start, start + len(pages))
            wanted = WantedDigests(transfer_id, asked.verify, blocks, pages, asked.num_tokens)
            self._digests.order((transfer_id, blocks), wanted)

    def _on_rank_digested(self, rank: int, report: PagesDigested, at: float) -> None:
        assert self._digests is not None, "nobody else orders digests"
        self._digests.hear(rank, report)
        while (answer := self._digests.take()) is not None:
            (transfer_id, blocks), found = answer
            self._meter.digested(found.seconds)
            self._tell(transfer_id, Digested(blocks, found.by_rank, found.error), at)

    def _published(self, ended_at: float) -> None:
        if ended_at:
            self._meter.published(now() - ended_at)

    def _send(self, transfer: _Transfer, transfer_id: TransferId, seq: int, body: Body) -> None:
        if transfer.peer is not None:
            envelope = make_envelope(self._identity.incarnation, transfer.peer.incarnation, transfer_id, seq)
            self._channel.send(transfer.peer.route, envelope, body)

    def _reply(self, received: Received, body: Body, transfer_id: TransferId) -> None:
        identity = self._identity
        sender = Incarnation(received.envelope.sender)
        envelope = make_envelope(identity.incarnation, sender, transfer_id, 0, identity.digest)
        self._channel.send(received.route, envelope, body)

    def _statistics(self, at: float) -> AgentStatistics:
        sessions = [transfer.session for transfer in self._transfers.values()]
        leases = self._leases(at)
        silences = {incarnation: at - heard for incarnation, heard in self._heard.items()}
        return AgentStatistics(
            transfers_open=sum(session.state is not PrefillState.ENDED for session in sessions),
            leases_active=len(leases),
            reads_outstanding=0,
            messages_dropped=self._channel.statistics().dropped,
            peers=tuple(
                PeerFacts(p.name, p.incarnation, "ready" if silences[p.incarnation] < SILENCE_S else "silent", "", 0.0)
                for p in self._peers.values()
            ),
            series=self._meter.series(),
            leases=leases,
            pages_stranded=sum(
                lease.view.num_pages for lease in leases if lease.view.state == PrefillState.FAILING.value
            ),
            silence_s=max((silence_s for silence_s in silences.values() if silence_s < SILENCE_S), default=0.0),
        )

    def _leases(self, at: float) -> tuple[LeaseFacts, ...]:
        return tuple(
            LeaseFacts(transfer_id, transfer.peer.name, view)
            for transfer_id, transfer in self._transfers.items()
            if transfer.peer is not None and (view := transfer.session.lease(at)) is not None
        )
