"""The engine process of a worker: model, arena, agent and transport put together, and the loop that runs them.

Three threads: this one owns the engine, the agent thread owns channel and transport, a third reads the link to the
front. They meet only at queues. The process ends when the front goes, when the agent dies, or when it cannot start.
"""

import argparse
import logging
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import msgspec
import torch

from pdkv.agent.decode_agent import DecodeAgent
from pdkv.agent.events import AgentStatistics, DecodeAgentEvent, Inspect, PrefillAgentEvent, WorkerIdentity
from pdkv.agent.loop import Agent, AgentLoop
from pdkv.agent.peer_links import PathRequirement, PeerLinks
from pdkv.agent.prefill_agent import PrefillAgent
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeasePolicy
from pdkv.core.manifest import pairing_digest
from pdkv.daemons.decode_role import DecodeRole
from pdkv.daemons.link import (
    BlockingLink,
    EngineFatal,
    EngineReady,
    PeerStatus,
    Status,
    StatusQuery,
    ToEngine,
    WorkerSettings,
)
from pdkv.daemons.logs import configure_logging
from pdkv.daemons.prefill_role import PrefillRole
from pdkv.daemons.roles import AgentSaid, EngineParts, FrontSaid, Inbox, Role
from pdkv.daemons.sizing import choose_num_pages
from pdkv.errors import ConfigError, PdkvError
from pdkv.m3.config import kv_layout, model_fingerprint
from pdkv.m3.engine import Engine
from pdkv.m3.model import load_model
from pdkv.m3.requests import EngineSettings
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

_LOG = logging.getLogger("pdkv.engine")
_LONGEST_WAIT_S = 1.0


class FrontGone(msgspec.Struct, frozen=True):
    """The front has closed the link: time to end."""


class AgentDied(msgspec.Struct, frozen=True):
    message: str


class Statistics(msgspec.Struct, frozen=True):
    query: int
    agent: AgentStatistics


class EngineProcess:
    """One worker's engine side, complete. ``run`` returns the exit code."""

    def __init__(self, settings: WorkerSettings, link: BlockingLink) -> None:
        self._settings = settings
        self._link = link
        self._inbox: Inbox = queue.SimpleQueue()
        torch.set_num_threads(settings.num_threads or os.cpu_count() or 1)
        model_dir = Path(settings.model_dir)
        model = load_model(model_dir, device=settings.device, dtype=settings.dtype)
        dtype = model.config.dtype
        needed = kv_layout(model.config, dtype, dtype)
        layout = RowLayout.of(needed)
        num_pages = choose_num_pages(settings, layout)
        arena = Arena.allocate(layout, num_pages)
        self._fingerprint = model_fingerprint(model_dir, model.config)
        manifest = build_manifest(arena, needed, self._fingerprint)
        self._incarnation = new_incarnation()
        probe = ProbePages(arena)
        if settings.role == "prefill":
            probe.fill(self._incarnation)
        self._layout = layout
        self._pool = PagePool(num_pages, reserved=probe.pages)
        self._engine = Engine(
            model,
            arena,
            self._pool,
            EngineSettings(
                max_model_len=settings.max_model_len,
                prefill_chunk=settings.prefill_chunk,
                max_batch=settings.max_batch,
            ),
        )
        transport = make_transport(settings)
        transport.register(arena.memory)
        channel = Channel(self._incarnation, NoSecurity(), insecure=settings.insecure)
        self._control = advertised(channel.bind(settings.control_listen), settings) if is_prefill(settings) else ""
        self._identity = WorkerIdentity(
            name=settings.name,
            incarnation=self._incarnation,
            manifest=manifest,
            offer=RankOffer(manifest=manifest, address=transport.address()),
            digest=pairing_digest([manifest]),
            policy=session_policy(settings.lease_ttl_s),
        )
        self._role = self._start_role(channel, transport, probe, arena.memory.address)
        self._transport_line = f"{transport.name}: {getattr(transport, 'describe', lambda: '')()}"

    def run(self) -> int:
        """Serve until the front goes."""
        threading.Thread(target=self._read_front, name="pdkv-front-link", daemon=True).start()
        self._link.send(self._ready())
        while True:
            for message in self._take():
                match message:
                    case FrontGone():
                        self._loop.stop()
                        return 0
                    case AgentDied(message=text):
                        raise PdkvError(f"the agent thread died: {text}")
                    case FrontSaid(message=StatusQuery(query=query)):
                        self._inspect(query)
                    case Statistics(query=query, agent=agent):
                        self._link.send(self._status(query, agent))
                    case FrontSaid(message=said):
                        self._role.on_front(said, time.monotonic())
                    case AgentSaid(event=event):
                        self._role.on_agent(event)
            self._role.on_time(time.monotonic())
            if self._engine.has_work:
                self._role.on_engine(self._engine.step())

    def _inspect(self, query: int) -> None:
        def answer(facts: AgentStatistics) -> None:
            self._inbox.put(Statistics(query, facts))

        self._loop.post(Inspect(answer=answer))

    def _take(self) -> list[object]:
        """What has come in; waits for it only while the engine has nothing to do."""
        messages = []
        if not self._engine.has_work:
            try:
                messages.append(self._inbox.get(timeout=_LONGEST_WAIT_S))
            except queue.Empty:
                return []
        while not self._inbox.empty():
            messages.append(self._inbox.get_nowait())
        return messages

    def _start_role(self, channel: Channel, transport: Transport, probe: ProbePages, base: int) -> Role:
        self._loop: AgentLoop[object] = AgentLoop(channel, transport)

        def emit(event: PrefillAgentEvent | DecodeAgentEvent) -> None:
            self._inbox.put(AgentSaid(event))

        agent: Agent[object]
        if is_prefill(self._settings):
            agent = PrefillAgent(self._identity, channel, emit)  # type: ignore[assignment]
        else:
            requirement = PathRequirement(self._settings.require_transport)
            links = PeerLinks(self._identity, channel, transport, probe, (base,), requirement)
            agent = DecodeAgent(self._identity, channel, transport, links, (base,), emit)  # type: ignore[assignment]
        self._loop.start(agent, lambda exc: self._inbox.put(AgentDied(repr(exc))))
        parts = EngineParts(engine=self._engine, post=self._loop.post, send=self._link.send)
        role = PrefillRole if is_prefill(self._settings) else DecodeRole
        return role(parts, self._layout.kv.block_size)

    def _read_front(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while (body := self._link.receive_bytes()) is not None:
            self._inbox.put(FrontSaid(decoder.decode(body)))
        self._inbox.put(FrontGone())

    def _ready(self) -> EngineReady:
        return EngineReady(
            role=self._settings.role,
            incarnation=self._incarnation,
            control=self._control,
            manifest_digest=self._identity.digest,
            model_fingerprint=self._fingerprint,
            max_model_len=self._settings.max_model_len,
            block_size=self._layout.kv.block_size,
            num_pages=self._identity.manifest.num_pages,
            bytes_per_token=self._layout.num_bytes // self._layout.kv.block_size,
            num_regions=len(self._layout.slots),
            transport=self._transport_line,
        )

    def _status(self, query: int, agent: AgentStatistics) -> Status:
        pool, engine = self._pool.statistics(), self._engine.statistics()
        return Status(
            query=query,
            role=self._settings.role,
            incarnation=self._incarnation,
            pages_usable=pool.num_usable,
            pages_free=pool.num_free,
            fragmentation=pool.fragmentation,
            requests_queued=engine.num_queued,
            requests_running=engine.num_prefilling + engine.num_decoding,
            transfers_open=agent.transfers_open,
            leases_active=agent.leases_active,
            reads_outstanding=agent.reads_outstanding,
            messages_dropped=agent.messages_dropped,
            peers=[PeerStatus(p.control, p.incarnation, p.state, p.path, p.probe_gbps) for p in agent.peers],
        )


def is_prefill(settings: WorkerSettings) -> bool:
    return settings.role == "prefill"


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


def advertised(endpoint: str, settings: WorkerSettings) -> str:
    """The bound endpoint as peers are to dial it."""
    port = endpoint.rpartition(":")[2]
    host = settings.advertise_host
    return f"tcp://{f'[{host}]' if ':' in host else host}:{port}"


def main() -> int:
    """Entry point: ``--fd`` names the inherited end of the link."""
    parser = argparse.ArgumentParser(prog="pdkv.daemons.engine_process")
    parser.add_argument("--fd", type=int, required=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the front ends us in order
    link = BlockingLink(socket.socket(fileno=parser.parse_args().fd))
    body = link.receive_bytes()
    if body is None:
        return 1
    settings = msgspec.msgpack.decode(body, type=WorkerSettings)
    configure_logging(settings.log_level, settings.role)
    try:
        return EngineProcess(settings, link).run()
    except PdkvError as exc:
        link.send(EngineFatal(message=str(exc), exit_code=exc.exit_code))
        return exc.exit_code
    except Exception as exc:  # noqa: BLE001 - the outermost frame: the front must learn why its engine went
        _LOG.exception("engine process died")
        link.send(EngineFatal(message=f"{type(exc).__name__}: {exc}", exit_code=1))
        return 1


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # daemon threads may still hold native locks: nothing is left to be done in order
