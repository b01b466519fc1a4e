"""Puts an engine process together: model, arena, page pool, engine, transport, channel and agent, from its settings."""

import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec
import torch

from pdkv.agent.decode_agent import DecodeAgent
from pdkv.agent.events import DecodeAgentEvent, PrefillAgentEvent, WorkerIdentity
from pdkv.agent.loop import Agent, AgentLoop, CrashHandler
from pdkv.agent.peer_links import PathRequirement, PeerLinks
from pdkv.agent.prefill_agent import PrefillAgent
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeasePolicy
from pdkv.core.manifest import pairing_digest
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.sizing import choose_num_pages
from pdkv.errors import ConfigError
from pdkv.m3.config import M3Config, kv_layout, model_fingerprint
from pdkv.m3.engine import Engine
from pdkv.m3.model import load_model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.pages import PagePool
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation
from pdkv.transport.base import Transport
from pdkv.transport.ucx import UcxOptions, UcxTransport
from pdkv.wire.channel import Channel, NoSecurity
from pdkv.wire.messages import RankOffer

Emit = Callable[[PrefillAgentEvent | DecodeAgentEvent], None]


class Assembly(msgspec.Struct, frozen=True):
    """The parts of one engine process. Engine and pool are the engine thread's, the rest of the agent thread's."""

    engine: Engine
    arena: Arena
    pool: PagePool
    layout: RowLayout
    identity: WorkerIdentity
    control: str
    """Endpoint of the control channel as peers are to dial it; empty on D, which only dials."""
    transport: str
    """One line: library, version, where it was found."""
    loop: AgentLoop[object]
    agent: Agent[object]

    def start_agent(self, on_crash: CrashHandler) -> None:
        self.loop.start(self.agent, on_crash)


def assemble(settings: WorkerSettings, emit: Emit, transport: Transport | None = None) -> Assembly:
    """Load the model, lay out and register the arena, bind the channel. ``emit`` gets the agent's events, from its
    thread, once it is started. ``transport`` stands in for the one that ``settings`` name. Raises whatever
    ``PdkvError`` keeps the worker from starting."""
    torch.set_num_threads(settings.num_threads or os.cpu_count() or 1)
    model = load_model(Path(settings.model_dir), device=settings.device, dtype=settings.dtype)
    transport = transport or make_transport(settings)
    incarnation = new_incarnation()
    layout = RowLayout.of(kv_layout(model.config, model.config.dtype, model.config.dtype))
    arena, identity = enroll(settings, model.config, transport, incarnation, choose_num_pages(settings, layout))
    probe = ProbePages(arena)
    pool = PagePool(arena.num_pages, reserved=probe.pages)
    channel = Channel(incarnation, NoSecurity(), insecure=settings.insecure)
    control = ""
    agent: PrefillAgent | DecodeAgent
    if settings.role == "prefill":
        probe.fill(incarnation)
        control = advertised(channel.bind(settings.control_listen), settings.advertise_host)
        agent = PrefillAgent(identity, channel, emit)
    else:
        bases = (arena.memory.address,)
        requirement = PathRequirement(settings.require_transport)
        links = PeerLinks(identity, channel, transport, probe, bases, requirement)
        agent = DecodeAgent(identity, channel, transport, links, bases, emit)
    bounds = EngineSettings(
        max_model_len=settings.max_model_len, prefill_chunk=settings.prefill_chunk, max_batch=settings.max_batch
    )
    return Assembly(
        engine=Engine(StepRunner(model, arena), pool, bounds),
        arena=arena,
        pool=pool,
        layout=layout,
        identity=identity,
        control=control,
        transport=describe(transport),
        loop=AgentLoop(channel, transport),
        agent=agent,  # type: ignore[arg-type]  # its own commands are all that its role posts
    )


def enroll(
    settings: WorkerSettings, config: M3Config, transport: Transport, incarnation: Incarnation, num_pages: int
) -> tuple[Arena, WorkerIdentity]:
    """An arena registered with ``transport``, and who its worker is to its peers."""
    needed = kv_layout(config, config.dtype, config.dtype)
    arena = Arena.allocate(RowLayout.of(needed), num_pages)
    transport.register(arena.memory)
    manifest = build_manifest(arena, needed, model_fingerprint(Path(settings.model_dir), config))
    return arena, WorkerIdentity(
        name=settings.name,
        incarnation=incarnation,
        manifest=manifest,
        offer=RankOffer(manifest=manifest, address=transport.address()),
        digest=pairing_digest([manifest]),
        policy=session_policy(settings.lease_ttl_s),
    )


def new_incarnation() -> Incarnation:
    return Incarnation(secrets.randbits(64) | 1 << 56)


def session_policy(lease_ttl_s: float) -> SessionPolicy:
    """A tenth of the lease as margin, four renewals in its life."""
    return SessionPolicy(LeasePolicy(ttl_s=lease_ttl_s, margin_s=lease_ttl_s / 10, renew_every_s=lease_ttl_s / 4))


def make_transport(settings: WorkerSettings) -> Transport:
    """``--transport auto`` is UCX, until others can be better for a pair of workers."""
    if settings.transport not in ("auto", "ucx"):
        raise ConfigError(f"transport {settings.transport!r} is not one of auto, ucx")
    return UcxTransport(UcxOptions(tls=settings.ucx_tls, library=settings.ucx_library))


def describe(transport: Transport) -> str:
    if isinstance(transport, UcxTransport):
        return f"ucx {transport.library.version} from {transport.library.source}, {transport.library.path}"
    return transport.name


def advertised(endpoint: str, host: str) -> str:
    """The bound endpoint with the host that peers are to dial."""
    port = endpoint.rpartition(":")[2]
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"
