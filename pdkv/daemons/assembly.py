"""Puts an engine process together: model, arena, page pool, engine, transport, channel and agent, from its settings."""

import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from pdkv.agent.decode_agent import DecodeAgent
from pdkv.agent.digest_group import DigestGroup
from pdkv.agent.events import DecodeAgentEvent, PrefillAgentEvent, RaiseWatermark, RankReported, WorkerIdentity
from pdkv.agent.loop import Agent, AgentLoop, CrashHandler, now
from pdkv.agent.page_checker import PageCheck, PageChecker
from pdkv.agent.paths import PathRequirement
from pdkv.agent.peer_links import PeerLinks
from pdkv.agent.prefill_agent import PrefillAgent
from pdkv.agent.rank_digests import PagesDigested, RankDigests
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import RankReads
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeasePolicy
from pdkv.core.manifest import pairing_digest
from pdkv.core.pull_queue import PullRate
from pdkv.core.residency import BlockRange
from pdkv.daemons.control_keys import channel_security
from pdkv.daemons.gpu_sizing import chunk_on, room_on
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.other_ranks import OtherRanks
from pdkv.daemons.rank_link import ArenaWanted, RankReady, RankSetup, ShareLoaded
from pdkv.daemons.rank_share import ArenaOrder, RankMemory, RankShare, cache_layout, device_of, furnish, load_share
from pdkv.daemons.ranked_runner import RankedRunner
from pdkv.daemons.sizing import choose_num_pages
from pdkv.daemons.transport_choice import describe, make_transport
from pdkv.errors import RankLostError
from pdkv.m3.config import M3Config, model_fingerprint
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.layer_progress import LayerProgress, TellGroups, group_starts
from pdkv.m3.model import M3Model
from pdkv.m3.prefix_cache import seed_of
from pdkv.m3.requests import EngineSettings, RequestId
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.page_digests import ArenaDigests
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, TransferId, VerifyPages
from pdkv.transport.base import Transport
from pdkv.wire.channel import Channel
from pdkv.wire.messages import RankOffer

Emit = Callable[[PrefillAgentEvent | DecodeAgentEvent], None]


class Assembly(msgspec.Struct, frozen=True):
    """The parts of one engine process. Engine and pool are the engine thread's, the rest of the agent thread's."""

    engine: Engine
    memory: RankMemory
    pool: PagePool
    layout: RowLayout
    identity: WorkerIdentity
    control: str
    """Address of the control channel as peers are to dial it; empty on D, which only dials."""
    keys: tuple[str, ...]
    """Fingerprints of the keys of the control channel, the own one first, then others that peers may have."""
    transport: str
    """One line: library, version, where it was found."""
    loop: AgentLoop[object]
    agent: Agent[object]

    def start_agent(self, on_crash: CrashHandler) -> None:
        self.loop.start(self.agent, on_crash)


def assemble(settings: WorkerSettings, emit: Emit, others: OtherRanks, transport: Transport | None = None) -> Assembly:
    """Load the model, lay out and register the arena, bind the channel. ``emit`` gets the agent's events, from its
    thread, once it is started. ``others``: the worker's other ranks, listening. ``transport`` stands in for the one
    that ``settings`` name. Raises whatever ``PdkvError`` keeps the worker from starting."""
    assert others.size == settings.tp_size, "whoever makes the ranks makes as many as the settings say"
    incarnation = new_incarnation()
    security = channel_security(settings.control_keys)
    share = _load_all(settings, others)
    transport = transport or make_transport(settings)
    memory, offers = _furnish_all(settings, share, others, transport, incarnation)
    arena = memory.arena
    identity = _identity(settings, incarnation, offers)
    pool = PagePool(arena.num_pages, reserved=memory.probe.pages)
    channel = Channel(incarnation, security, insecure=settings.insecure)
    loop: AgentLoop[object] = AgentLoop(channel, transport)
    digests = RankDigests(identity.manifest, ArenaDigests(arena), _reporting(loop))
    control = ""
    agent: PrefillAgent | DecodeAgent
    if settings.role == "prefill":
        control = advertised(channel.bind(settings.control_listen), settings.advertise_host)
        of_blocks: DigestGroup[tuple[TransferId, BlockRange]] = DigestGroup(digests, others.carriers())
        agent = PrefillAgent(identity, channel, emit, of_blocks)
    else:
        reads = RankReads(transport, identity.manifest, memory.probe, (arena.memory.address,))
        ranks = RankGroup(reads, others.carriers())
        links = PeerLinks(identity, channel, ranks, PathRequirement(settings.require_transport))
        rate = PullRate(settings.max_pull_gbps * 1e9) if settings.max_pull_gbps else None
        checker = None
        if settings.verify_pages is not VerifyPages.OFF:
            of_checks: DigestGroup[PageCheck] = DigestGroup(digests, others.carriers())
            checker = PageChecker(settings.verify_pages, of_checks, identity.manifests, links.meter)
        agent = DecodeAgent(identity, channel, ranks, links, emit, rate, checker)
    bounds = EngineSettings(
        max_model_len=settings.max_model_len,
        prefill_chunk=chunk_on(settings, share.model),
        max_batch=settings.max_batch,
        prefix_seed=seed_of(identity.manifest.model_fingerprint, share.layout.kv) if settings.prefix_cache else None,
        speculative_tokens=settings.speculative_tokens,
        batch_invariant=settings.batch_invariant,
    )
    return Assembly(
        engine=Engine(RankedRunner(_runner(settings, share.model, arena, bounds, loop), others), pool, bounds),
        memory=memory,
        pool=pool,
        layout=share.layout,
        identity=identity,
        control=control,
        keys=security.accepted,
        transport=describe(transport),
        loop=loop,
        agent=agent,  # type: ignore[arg-type]  # its own commands are all that its role posts
    )


def _runner(
    settings: WorkerSettings, model: M3Model, arena: Arena, bounds: EngineSettings, loop: AgentLoop[object]
) -> StepRunner:
    """Steps that only decode happen on a decode worker; on a GPU they are captured before anybody asks for one.

    A prefill worker's steps tell its agent of layers that are ready, whatever the engine thread is at.
    """
    if settings.role == "prefill":
        num_layers = model.config.num_layers
        starts = _layer_groups(settings, num_layers)
        return StepRunner(model, arena, progress=LayerProgress(starts, num_layers, model.device, _telling(loop)))
    shapes = DecodeShapes.of(bounds, model.config.block_size, arena.num_pages)
    runner = StepRunner(model, arena, shapes, always_shaped=settings.batch_invariant)
    runner.prepare()
    return runner


def _telling(loop: AgentLoop[object]) -> TellGroups:
    def tell(request: RequestId, tokens: int, num_groups: int) -> None:
        loop.post(RaiseWatermark(TransferId(request), tokens, now(), num_groups))

    return tell


def _reporting(loop: AgentLoop[object]) -> Callable[[PagesDigested], None]:
    return lambda report: loop.post(RankReported(0, report))


def _load_all(settings: WorkerSettings, others: OtherRanks) -> RankShare:
    """Every rank loads its share at the same time; returns rank 0's when all have."""
    port = others.meeting.open()
    others.tell_each(lambda rank: RankSetup(settings, rank, port))
    try:
        group = others.meeting.join(device_of(settings, 0))
    except RankLostError as exc:
        raise others.loss() or exc from exc
    share = load_share(settings, group)
    others.gather(ShareLoaded)
    return share


def _furnish_all(
    settings: WorkerSettings, share: RankShare, others: OtherRanks, transport: Transport, incarnation: Incarnation
) -> tuple[RankMemory, tuple[RankOffer, ...]]:
    """Rank 0's arena, and the offers of all ranks: as many pages on each, so that page numbers mean the same."""
    order = ArenaOrder(
        num_pages=choose_num_pages(settings, share.layout, room_on(settings, share.model)),
        incarnation=incarnation,
        fingerprint=_fingerprint(settings, share.model.config),
    )
    others.tell(ArenaWanted(order))
    memory = furnish(settings, share.layout, transport, order)
    return memory, (memory.offer, *(ready.offer for ready in others.gather(RankReady)))


def _identity(settings: WorkerSettings, incarnation: Incarnation, offers: tuple[RankOffer, ...]) -> WorkerIdentity:
    return WorkerIdentity(
        name=settings.name,
        incarnation=incarnation,
        offers=offers,
        digest=pairing_digest([offer.manifest for offer in offers]),
        policy=session_policy(settings.lease_ttl_s, _layer_groups(settings, offers[0].manifest.num_layers)),
    )


def enroll(
    settings: WorkerSettings, config: M3Config, transport: Transport, incarnation: Incarnation, num_pages: int
) -> tuple[RankMemory, WorkerIdentity]:
    """Pages without a model, registered with ``transport``, and who their only rank is to peers."""
    layout = RowLayout.of(cache_layout(settings, config))
    order = ArenaOrder(num_pages, incarnation, _fingerprint(settings, config))
    memory = furnish(settings, layout, transport, order)
    return memory, _identity(settings, incarnation, (memory.offer,))


def _fingerprint(settings: WorkerSettings, config: M3Config) -> str:
    return model_fingerprint(None if settings.load_format == "dummy" else Path(settings.model_dir), config)


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(64) | 1 << 56)


def session_policy(lease_ttl_s: float, layer_groups: tuple[int, ...] = (0,)) -> SessionPolicy:
    """A tenth of the lease as margin, four renewals in its life."""
    lease = LeasePolicy(ttl_s=lease_ttl_s, margin_s=lease_ttl_s / 10, renew_every_s=lease_ttl_s / 4)
    return SessionPolicy(lease, layer_groups=layer_groups)


def _layer_groups(settings: WorkerSettings, num_layers: int) -> tuple[int, ...]:
    return group_starts(num_layers, settings.layer_groups)


def advertised(endpoint: str, host: str) -> str:
    """The bound endpoint with the host that peers are to dial."""
    port = endpoint.rpartition(":")[2]
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
