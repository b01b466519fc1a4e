"""D's agent: carries out what decode sessions decide, over links that have proved themselves."""

import logging
from collections.abc import Callable, Sequence

from pdkv.agent.account import Account
from pdkv.agent.appointments import Appointments
from pdkv.agent.events import (
    AbandonTransfer,
    AgentStatistics,
    DecodeAgentEvent,
    DecodeCommand,
    Inspect,
    PagesReturned,
    RankReported,
    StartTransfer,
    TransferArrived,
    TransferFailed,
    WorkerIdentity,
)
from pdkv.agent.loop import Agent, now
from pdkv.agent.page_checker import PageChecker
from pdkv.agent.peer_links import LinkState, PeerLink, PeerLinks
from pdkv.agent.rank_digests import PagesDigested
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import LinkConnected, LinkProbed, PagesRead
from pdkv.core.decode_session import DecodeSession, DecodeState
from pdkv.core.events import (
    Check,
    ClosePeer,
    DecodeEvent,
    DecodeInstruction,
    LocalFailure,
    MessageArrived,
    PeerLost,
    Read,
    ReadEnded,
    Report,
    Resume,
    ReturnPages,
    Send,
    Tick,
)
from pdkv.core.pull_queue import PullQueue, PullRate
from pdkv.core.residency import WantedBlocks
from pdkv.errors import ConfigError, FailureCode, HandshakeError
from pdkv.schema import LayerRange, TransferId, VerifyPages
from pdkv.transport.base import Completion
from pdkv.wire.admission import Refused
from pdkv.wire.channel import Channel, Received
from pdkv.wire.messages import NO_TRANSFER, Done, Granted, OtherVersion, make_envelope

_LOG = logging.getLogger("pdkv.agent")


class _Transfer:
    """One transfer's session and what it has taken so far."""

    def __init__(self, start: StartTransfer, session: DecodeSession, link: PeerLink, at: float) -> None:
        self.start = start
        self.session = session
        self.link = link
        self.account = Account(start, link, at)
        self.reading: dict[int, _OpenRead] = {}
        """By the session's number of a read."""


class _OpenRead:
    """A read that the session has not heard the end of."""

    def __init__(self) -> None:
        self.num_slices = 0
        """Posted, and not ended yet."""
        self.waits = True
        """Some of it is still to be posted."""
        self.error = ""


class DecodeAgent(Agent[DecodeCommand]):
    """Owned by the agent thread. ``emit`` is called from it; it must only queue."""

    def __init__(
        self,
        identity: WorkerIdentity,
        channel: Channel,
        ranks: RankGroup,
        links: PeerLinks,
        emit: Callable[[DecodeAgentEvent], None],
        rate: PullRate | None = None,
        checker: PageChecker | None = None,
    ) -> None:
        """``rate``: how fast to read at most, over all ranks. ``checker``: compares digests of what was read."""
        self._identity = identity
        self._channel = channel
        self._ranks = ranks
        self._links = links
        self._meter = links.meter
        self._emit = emit
        self._checker = checker
        self._waiting: dict[TransferId, tuple[StartTransfer, PeerLink, float]] = {}
        self._transfers: dict[TransferId, _Transfer] = {}
        self._appointments: Appointments[TransferId] = Appointments()
        self._reads: dict[int, tuple[_Transfer, int]] = {}
        """By the ranks' number of a slice: whose it is, and the session's number of the read."""
        self._queue: PullQueue[TransferId] = PullQueue(rate)
        self._bytes_of: dict[LayerRange, int] = {}

    # ---- what happens

    def on_command(self, command: DecodeCommand, at: float) -> None:
        match command:
            case StartTransfer():
                self._on_start(command, at)
            case AbandonTransfer(transfer=transfer, code=code, message=message):
                if transfer in self._waiting:
                    self._refuse(self._waiting.pop(transfer)[0], code, message)
                elif transfer in self._transfers:
                    self._handle(self._transfers[transfer], LocalFailure(code, message), at)
            case RankReported(rank=rank, report=report):
                if isinstance(report, PagesDigested):
                    assert self._checker is not None, "nobody else orders digests"
                    self._checker.hear(rank, report)
                else:
                    self._ranks.hear(rank, report)
            case Inspect(answer=answer):
                answer(self._statistics(at))
        self._settle(at)

    def on_message(self, received: Received, at: float) -> None:
        envelope, body = received.envelope, received.body
        if envelope.addressee != self._identity.incarnation:
            self._channel.drop(f"addressed to incarnation {envelope.addressee:016x}")
            return
        if envelope.transfer == NO_TRANSFER or isinstance(body, OtherVersion):
            self._links.on_message(received, at)
        else:
            transfer = self._transfers.get(TransferId(envelope.transfer))
            if transfer is None or transfer.link.incarnation != envelope.sender:
                self._channel.drop(f"transfer {envelope.transfer.hex()} is not known, or not of that worker")
                return
            if isinstance(body, Granted):
                transfer.account.granted(at)
            if isinstance(body, Done):
                transfer.account.done(at)
            if self._handle(transfer, MessageArrived(envelope.seq, body), at):
                waited_s = now() - at
                transfer.account.posted_after(waited_s)
                self._meter.followed(waited_s)
        self._settle(at)

    def on_refused(self, refused: Refused, at: float) -> None:
        self._meter.kept_out(refused.reason)
        self._links.on_refused(refused)
        self._settle(at)

    def on_completions(self, completions: Sequence[Completion], at: float) -> None:
        self._ranks.on_completions(completions)
        self._settle(at)

    def on_time(self, at: float) -> None:
        self._links.on_time(at)
        for transfer_id in self._appointments.take_due(at):
            transfer = self._transfers[transfer_id]
            if transfer.session.forgettable(at):
                del self._transfers[transfer_id]
            else:
                self._handle(transfer, Tick(), at)
        self._post(at)  # after the sessions have looked at their leases
        self._settle(at)

    def next_wakeup(self) -> float | None:
        times = (self._links.next_wakeup(), self._queue.next_wakeup(), self._appointments.next_time())
        return min((t for t in times if t is not None), default=None)

    def close(self, at: float) -> None:
        for start, _, _ in self._waiting.values():
            self._refuse(start, FailureCode.SHUTDOWN, "this worker is shutting down")
        for transfer in list(self._transfers.values()):
            if transfer.session.state is not DecodeState.ENDED:
                self._handle(transfer, LocalFailure(FailureCode.SHUTDOWN, "decode worker is shutting down"), at)
        self._links.farewell()
        if self._checker is not None:
            self._checker.close()

    # ---- links

    def _on_start(self, start: StartTransfer, at: float) -> None:
        if start.transfer in self._transfers or start.transfer in self._waiting:
            self._refuse(start, FailureCode.INTERNAL, f"transfer {start.transfer.hex()} is known already")
            return
        try:
            link = self._links.get(start.control, start.incarnation, at)
        except ConfigError as exc:
            self._refuse(start, FailureCode.PEER_LOST, str(exc))
            return
        if link.state is LinkState.READY:
            self._begin(start, link, at, at)
        else:
            self._waiting[start.transfer] = (start, link, at)

    def _begin(self, start: StartTransfer, link: PeerLink, asked_at: float, at: float) -> None:
        block_size = self._identity.manifest.block_size
        left_s = max(0.0, start.deadline_s - (at - asked_at))
        wanted = WantedBlocks(start.num_tokens, block_size, start.resident_blocks)
        verify = VerifyPages.OFF if self._checker is None else self._checker.verify
        session = DecodeSession(self._identity.policy, wanted, left_s, at, verify)
        transfer = _Transfer(start, session, link, at)
        self._transfers[start.transfer] = transfer
        self._carry_out(transfer, session.start(at), at)
        self._meet_again(transfer)

    def _refuse(self, start: StartTransfer, code: FailureCode, message: str) -> None:
        self._meter.failed("unknown", code, 0.0)
        self._emit(TransferFailed(start.transfer, code, message))
        self._emit(PagesReturned(start.transfer))

    def _settle(self, at: float) -> None:
        """Pass on what the ranks have answered, then tell transfers what became of their links, until all is quiet."""
        quiet = False
        while not quiet:
            quiet = True
            while (answer := self._ranks.take()) is not None:
                quiet = False
                match answer:
                    case PagesRead():
                        self._on_pages_read(answer, at)
                    case LinkConnected():
                        self._links.on_connected(answer)
                        self._links.on_time(at)  # it may be its turn to be probed
                    case LinkProbed():
                        self._links.on_probed(answer, at)
                        self._links.on_time(at)
            while self._checker is not None and (checked := self._checker.take(self._is_receiving)) is not None:
                quiet = False
                self._handle(self._transfers[checked[0]], checked[1], at)
            self._settle_links(at)

    def _is_receiving(self, transfer_id: TransferId) -> bool:
        transfer = self._transfers.get(transfer_id)
        return transfer is not None and transfer.session.state is DecodeState.RECEIVING

    def _settle_links(self, at: float) -> None:
        """Transfers that waited for a link, or lived on one that is lost, learn of it."""
        while changed := self._links.take_changed():
            for link in changed:
                for transfer_id, (start, wanted, asked_at) in list(self._waiting.items()):
                    if wanted is link:
                        del self._waiting[transfer_id]
                        self._on_link(start, link, asked_at, at)
                if link.state is LinkState.LOST:
                    for transfer in [t for t in self._transfers.values() if t.link is link]:
                        self._handle(transfer, PeerLost(str(link.error)), at)

    def _on_link(self, start: StartTransfer, link: PeerLink, asked_at: float, at: float) -> None:
        if link.state is LinkState.READY:
            self._begin(start, link, asked_at, at)
        else:
            self._refuse(start, link.error.code, str(link.error))

    # ---- sessions

    def _handle(self, transfer: _Transfer, event: DecodeEvent, at: float) -> bool:
        """Whether reads were posted at once."""
        instructions = transfer.session.handle(event, at)
        self._carry_out(transfer, instructions, at)
        self._meet_again(transfer)
        if self._queue.is_limited or not any(isinstance(instruction, Read) for instruction in instructions):
            return False
        self._post(at)
        return True

    def _meet_again(self, transfer: _Transfer) -> None:
        self._appointments.set(transfer.start.transfer, transfer.session.next_wakeup())

    def _carry_out(self, transfer: _Transfer, instructions: Sequence[DecodeInstruction], at: float) -> None:
        transfer_id = transfer.start.transfer
        for instruction in instructions:
            match instruction:
                case Send(seq=seq, body=body):
                    envelope = make_envelope(self._identity.incarnation, transfer.link.incarnation, transfer_id, seq)
                    self._channel.send(transfer.link.route, envelope, body)
                case Read(read=read, layers=layers):
                    transfer.reading[read] = _OpenRead()
                    self._queue.put(transfer_id, instruction, self._bytes_per_block(layers))
                case Check():
                    assert self._checker is not None, "the session was told to verify"
                    start = transfer.start
                    self._checker.check(instruction, transfer_id, transfer.link, start.pages, start.num_tokens)
                case Resume(token=token, logprob=logprob, attachment=attachment):
                    facts = transfer.account.facts(at, transfer.session.cached_tokens)
                    self._emit(TransferArrived(transfer_id, token, logprob, facts, attachment))
                    self._meter.arrived(facts)
                case Report(outcome=outcome):
                    if outcome.code is not None:
                        self._meter.failed(transfer.link.path, outcome.code, transfer.account.seconds(at))
                        self._emit(TransferFailed(transfer_id, outcome.code, outcome.message))
                        self._stop_posting(transfer, at)
                case ReturnPages():
                    self._emit(PagesReturned(transfer_id))
                case ClosePeer(message=message):
                    told = f"endpoint to {transfer.link.control} closed: {message}"
                    self._links.lose(transfer.link, HandshakeError(FailureCode.PEER_LOST, told))

    def _post(self, at: float) -> None:
        """What the limit allows of what waits."""
        for transfer_id, piece in self._queue.take(at):
            transfer, read = self._transfers[transfer_id], piece.read
            number = transfer.link.number
            assert number is not None, "transfers begin on links that are ready"
            local = transfer.start.pages[read.blocks.start : read.blocks.stop]
            self._reads[self._ranks.read(number, read.source_pages, local, read.layers)] = (transfer, read.read)
            transfer.account.posted(at)
            opened = transfer.reading[read.read]
            opened.num_slices += 1
            opened.waits = not piece.is_last

    def _stop_posting(self, transfer: _Transfer, at: float) -> None:
        """What has not been posted of a failed transfer never will be."""
        for read in self._queue.drop(transfer.start.transfer):
            opened = transfer.reading[read]
            opened.waits = False
            opened.error = opened.error or "not posted any more"
            self._end_if_over(transfer, read, at)

    def _end_if_over(self, transfer: _Transfer, read: int, at: float) -> None:
        opened = transfer.reading[read]
        if not opened.waits and opened.num_slices == 0:
            del transfer.reading[read]
            self._handle(transfer, ReadEnded(read, not opened.error, opened.error), at)

    def _bytes_per_block(self, layers: LayerRange) -> int:
        """What travels of one block, over all ranks."""
        if layers not in self._bytes_of:
            regions = [region for manifest in self._identity.manifests for region in manifest.regions]
            self._bytes_of[layers] = sum(region.bytes_per_page for region in regions if region.layer in layers)
        return self._bytes_of[layers]

    def _on_pages_read(self, answer: PagesRead, at: float) -> None:
        transfer, read = self._reads.pop(answer.read)
        for batch in answer.batches:
            self._meter.posted(transfer.link.path, batch.num_spans, batch.post_s)
        if answer.error and answer.batches:
            # An endpoint that failed once is not trusted again: the next transfer shakes hands anew.
            told = f"reading from {transfer.link.control} failed: {answer.error}"
            self._links.lose(transfer.link, HandshakeError(FailureCode.READ_FAILED, told))
        transfer.account.read_ended(answer, at)
        opened = transfer.reading[read]
        opened.num_slices -= 1
        opened.error = opened.error or answer.error
        if answer.error:
            self._stop_posting(transfer, at)
        if transfer.reading.get(read) is opened:
            self._end_if_over(transfer, read, at)

    def _statistics(self, at: float) -> AgentStatistics:
        open_transfers = [t for t in self._transfers.values() if t.session.state is not DecodeState.ENDED]
        return AgentStatistics(
            transfers_open=len(open_transfers) + len(self._waiting),
            leases_active=0,
            reads_outstanding=self._ranks.num_reads_outstanding,
            messages_dropped=self._channel.statistics().dropped,
            peers=self._links.facts(),
            series=self._meter.series(),
            pages_stranded=sum(len(t.start.pages) for t in open_transfers if t.session.state is DecodeState.FAILING),
            silence_s=self._links.silence_s(at),
        )
