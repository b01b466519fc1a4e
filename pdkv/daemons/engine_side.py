"""The engine side of a worker: what runs between its front, its engine and its agent, one turn at a time."""

import time
from collections.abc import Callable

import msgspec

from pdkv.agent.events import AgentStatistics, DecodeAgentEvent, Inspect, PrefillAgentEvent, RankReported
from pdkv.agent.loop import now
from pdkv.agent.rank_digests import PagesDigested
from pdkv.agent.rank_reads import RankReport
from pdkv.core.manifest import ranges
from pdkv.daemons.assembly import assemble
from pdkv.daemons.decode_role import DecodeRole
from pdkv.daemons.engine_gauges import engine_gauges
from pdkv.daemons.inbox import Inbox
from pdkv.daemons.link import (
    Beat,
    EngineReady,
    LeaseStatus,
    ManifestQuery,
    Manifests,
    PeerStatus,
    RegionSummary,
    Status,
    StatusQuery,
    ToEngine,
    ToFront,
    WorkerSettings,
)
from pdkv.daemons.other_ranks import OtherRanks
from pdkv.daemons.prefill_role import PrefillRole
from pdkv.daemons.roles import EngineParts, Role
from pdkv.daemons.transfer_journal import TransferJournal
from pdkv.errors import PdkvError, RankLostError
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout, RowSlot
from pdkv.transport.base import Transport


class _FrontSaid(msgspec.Struct, frozen=True):
    message: ToEngine


class _AgentSaid(msgspec.Struct, frozen=True):
    event: PrefillAgentEvent | DecodeAgentEvent


class _AgentDied(msgspec.Struct, frozen=True):
    message: str


class _RankLost(msgspec.Struct, frozen=True):
    error: RankLostError


class _Inspected(msgspec.Struct, frozen=True):
    query: StatusQuery
    agent: AgentStatistics


class EngineSide:
    """One worker without its front. ``hear`` may be called from any thread, all else from the engine thread.

    ``send`` gets every message for the front, from the engine thread.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        send: Callable[[ToFront], None],
        transport: Transport | None = None,
        others: OtherRanks | None = None,
    ) -> None:
        """Load and start everything. ``transport`` stands in for the one that ``settings`` name, ``others`` are the
        ranks beside this one where there are any; both are owned from here on. Raises whatever ``PdkvError`` keeps the
        worker from starting."""
        self._settings = settings
        self._journal = TransferJournal()
        self._send = self._journal.sending(send)
        self._turned_at = time.monotonic()
        self._inbox = Inbox[msgspec.Struct]()
        self._others = others or OtherRanks()
        self._others.listen(self._hear_rank, lambda error: self._inbox.put(_RankLost(error)))
        try:
            self._parts = assemble(settings, lambda event: self._inbox.put(_AgentSaid(event)), self._others, transport)
        except BaseException:
            self._others.close()
            raise
        self._parts.start_agent(lambda exc: self._inbox.put(_AgentDied(repr(exc))))
        self._engine = self._parts.engine
        post = self._journal.posting(self._parts.loop.post)
        parts = EngineParts(engine=self._engine, post=post, send=self._send, meter=self._journal.meter)
        block_size = self._parts.layout.kv.block_size
        self._role: Role = (
            PrefillRole(parts, block_size, settings.max_model_len)
            if settings.role == "prefill"
            else DecodeRole(parts, block_size)
        )

    @property
    def arena(self) -> Arena:
        return self._parts.memory.arena

    def hear(self, message: ToEngine) -> None:
        """Queue a message of the front."""
        self._inbox.put(_FrontSaid(message))

    def _hear_rank(self, rank: int, report: RankReport | PagesDigested) -> None:
        """What another rank has to tell the agent; there is none before the agent has ordered something."""
        self._parts.loop.post(RankReported(rank, report))

    def turn(self, longest_wait_s: float) -> None:
        """Act on all that has come in, then run one step of the engine; waits only while there is nothing to do.

        Raises ``PdkvError`` when the agent thread has died, for leases are kept by nobody then, or a rank is lost.
        """
        self._turned_at = time.monotonic()
        for message in self._inbox.take(0.0 if self._engine.has_work else longest_wait_s):
            self._on_message(message)
        self._role.on_time(time.monotonic())
        if self._engine.has_work:
            self._role.on_step(now())
            self._role.on_engine(self._engine.step())

    def beat(self, query: int) -> Beat:
        """How long ago each thread came round, the agent's that of the slowest rank. May be called from any thread."""
        at = time.monotonic()
        agent_age_s = max(at - self._parts.loop.turned_at, self._others.beat_age_s())
        return Beat(query, at - self._turned_at, agent_age_s)

    def close(self) -> None:
        """Let the other ranks end; end the agent thread, and with it channel and transport."""
        self._others.close()
        self._parts.loop.stop()
        self._parts.memory.stop_touching()

    def ready(self) -> EngineReady:
        """Who this worker is, for the front."""
        identity, layout = self._parts.identity, self._parts.layout
        return EngineReady(
            role=self._settings.role,
            incarnation=identity.incarnation,
            control=self._parts.control,
            manifest_digest=identity.digest,
            model_fingerprint=identity.manifest.model_fingerprint,
            max_model_len=self._settings.max_model_len,
            block_size=layout.kv.block_size,
            num_pages=identity.manifest.num_pages,
            bytes_per_token=layout.num_bytes // layout.kv.block_size,
            num_regions=len(layout.slots),
            transport=self._parts.transport,
            control_key=next(iter(self._parts.keys), ""),
            accepted_keys=list(self._parts.keys),
            tp_size=self._settings.tp_size,
            regions=summarize(layout),
        )

    def _on_message(self, message: msgspec.Struct) -> None:
        match message:
            case _FrontSaid(message=StatusQuery() as query):
                self._parts.loop.post(Inspect(answer=lambda facts: self._inbox.put(_Inspected(query, facts))))
            case _FrontSaid(message=ManifestQuery(query=number)):
                self._send(Manifests(number, self._parts.identity.manifests))
            case _FrontSaid(message=said):
                self._journal.front_said(said)
                self._role.on_front(said, time.monotonic())
            case _AgentSaid(event=event):
                self._journal.agent_said(event)
                self._role.on_agent(event)
            case _Inspected(query=query, agent=agent):
                self._send(self._status(query, agent))
            case _AgentDied(message=text):
                raise PdkvError(f"the agent thread died: {text}")
            case _RankLost(error=error):
                raise error
            case _:
                raise AssertionError(f"nobody puts {type(message).__name__} here")

    def _status(self, asked: StatusQuery, agent: AgentStatistics) -> Status:
        pool, engine = self._parts.pool.statistics(), self._engine.statistics()
        gauges = engine_gauges(self._settings.role, pool, engine, agent) if asked.with_series else ()
        return Status(
            query=asked.query,
            role=self._settings.role,
            incarnation=self._parts.identity.incarnation,
            pages_usable=pool.num_usable,
            pages_free=pool.num_free,
            fragmentation=pool.fragmentation,
            requests_queued=engine.num_queued,
            requests_running=engine.num_prefilling + engine.num_decoding,
            transfers_open=agent.transfers_open,
            leases_active=agent.leases_active,
            reads_outstanding=agent.reads_outstanding,
            messages_dropped=agent.messages_dropped,
            leases=[LeaseStatus(e.transfer.hex(), e.peer, **msgspec.structs.asdict(e.view)) for e in agent.leases],
            peers=[PeerStatus(p.control, p.incarnation, p.state, p.path, p.probe_gbps, p.note) for p in agent.peers],
            series=[*self._journal.meter.series(), *agent.series, *gauges] if asked.with_series else [],
        )


def summarize(layout: RowLayout) -> list[RegionSummary]:
    """The rank's regions by name, in the order of the row."""
    by_name: dict[str, list[RowSlot]] = {}
    for slot in layout.slots:
        by_name.setdefault(slot.spec.name, []).append(slot)
    return [
        RegionSummary(
            name=name,
            dtype=slots[0].spec.dtype,
            layers=ranges(sorted({slot.spec.layer for slot in slots})),
            heads=len({slot.head for slot in slots}),
            bytes_per_token=sum(slot.num_bytes for slot in slots) // layout.kv.block_size,
            num_regions=len(slots),
        )
        for name, slots in by_name.items()
    ]
