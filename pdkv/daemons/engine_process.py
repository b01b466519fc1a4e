"""The engine process of a worker: the loop between its front, its engine and its agent.

Three threads: this one owns the engine, the agent thread owns channel and transport, a third reads the link to the
front. They meet only at queues. The process ends when the front goes, when the agent dies, or when it cannot start.
"""

import argparse
import logging
import os
import queue
import signal
import socket
import sys
import threading
import time

import msgspec

from pdkv.agent.events import AgentStatistics, DecodeAgentEvent, Inspect, PrefillAgentEvent
from pdkv.daemons.assembly import assemble
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
from pdkv.daemons.roles import EngineParts, Role
from pdkv.errors import PdkvError

_LOG = logging.getLogger("pdkv.engine")
_LONGEST_WAIT_S = 0.5
"""How late a deadline may be noticed by an idle engine."""


class _FrontSaid(msgspec.Struct, frozen=True):
    message: ToEngine


class _FrontGone(msgspec.Struct, frozen=True):
    pass


class _AgentSaid(msgspec.Struct, frozen=True):
    event: PrefillAgentEvent | DecodeAgentEvent


class _AgentDied(msgspec.Struct, frozen=True):
    message: str


class _Inspected(msgspec.Struct, frozen=True):
    query: int
    agent: AgentStatistics


class EngineProcess:
    """One worker's engine side. Everything but the queue belongs to the thread that calls ``run``."""

    def __init__(self, settings: WorkerSettings, link: BlockingLink) -> None:
        self._settings = settings
        self._link = link
        self._inbox: queue.SimpleQueue[msgspec.Struct] = queue.SimpleQueue()
        self._parts = assemble(settings, lambda event: self._inbox.put(_AgentSaid(event)))
        self._parts.start_agent(lambda exc: self._inbox.put(_AgentDied(repr(exc))))
        self._engine = self._parts.engine
        parts = EngineParts(engine=self._engine, post=self._parts.loop.post, send=link.send)
        role = PrefillRole if settings.role == "prefill" else DecodeRole
        self._role: Role = role(parts, self._parts.layout.kv.block_size)

    def run(self) -> int:
        """Serve until the front goes; returns the exit code. Raises ``PdkvError`` when the agent has died."""
        threading.Thread(target=self._read_front, name="pdkv-front-link", daemon=True).start()
        self._link.send(self._ready())
        while True:
            for message in self._take():
                if isinstance(message, _FrontGone):
                    self._parts.loop.stop()
                    return 0
                self._on_message(message)
            self._role.on_time(time.monotonic())
            if self._engine.has_work:
                self._role.on_engine(self._engine.step())

    def _on_message(self, message: msgspec.Struct) -> None:
        match message:
            case _FrontSaid(message=StatusQuery(query=query)):
                self._inspect(query)
            case _FrontSaid(message=said):
                self._role.on_front(said, time.monotonic())
            case _AgentSaid(event=event):
                self._role.on_agent(event)
            case _Inspected(query=query, agent=agent):
                self._link.send(self._status(query, agent))
            case _AgentDied(message=text):
                raise PdkvError(f"the agent thread died: {text}")
            case _:
                raise AssertionError(f"nobody puts {type(message).__name__} here")

    def _take(self) -> list[msgspec.Struct]:
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

    def _read_front(self) -> None:
        decoder = msgspec.msgpack.Decoder(ToEngine)
        while (body := self._link.receive_bytes()) is not None:
            self._inbox.put(_FrontSaid(decoder.decode(body)))
        self._inbox.put(_FrontGone())

    def _inspect(self, query: int) -> None:
        self._parts.loop.post(Inspect(answer=lambda facts: self._inbox.put(_Inspected(query, facts))))

    def _ready(self) -> EngineReady:
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
        )

    def _status(self, query: int, agent: AgentStatistics) -> Status:
        pool, engine = self._parts.pool.statistics(), self._engine.statistics()
        return Status(
            query=query,
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
            peers=[PeerStatus(p.control, p.incarnation, p.state, p.path, p.probe_gbps) for p in agent.peers],
        )


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
