"""A prefill and a decode worker as agents in one process: real channels, threads and arenas, no model."""

import queue
import time
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch

from pdkv.agent import events as e
from pdkv.agent.decode_agent import DecodeAgent
from pdkv.agent.loop import AgentLoop
from pdkv.agent.paths import PathRequirement
from pdkv.agent.peer_links import PeerLinks
from pdkv.agent.prefill_agent import PrefillAgent
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import RankReads
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeasePolicy
from pdkv.core.manifest import pairing_digest
from pdkv.daemons.assembly import new_incarnation
from pdkv.errors import FailureCode
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, Manifest, TransferId
from pdkv.transport.base import Transport
from pdkv.transport.inproc import InprocTransport
from pdkv.wire.channel import Channel, NoSecurity
from pdkv.wire.messages import RankOffer
from tests.layouts import make_layout

KV = make_layout(num_layers=3, num_dense=1, kv_dtype="float32", index_dtype="float32", head_dim=16)
POLICY = SessionPolicy(LeasePolicy(ttl_s=2.0, margin_s=0.2, renew_every_s=0.5), close_grace_s=0.3)
PATIENCE_S = 20.0

Event = TypeVar("Event")


class AgentSide:
    """What both roles have: an arena, an identity, a running loop, and the events that came out of it."""

    def __init__(
        self,
        role: str,
        *,
        name: str | None = None,
        num_pages: int = 20,
        transport: Transport | None = None,
        change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
    ) -> None:
        self.incarnation = new_incarnation()
        self.arena = Arena.allocate(RowLayout.of(KV), num_pages)
        self.probe = ProbePages(self.arena)
        self.transport = transport or InprocTransport()
        self.transport.register(self.arena.memory)
        self.channel = Channel(self.incarnation, NoSecurity())
        manifest = change(build_manifest(self.arena, KV, "model"))
        self.identity = e.WorkerIdentity(
            name=name or f"{role}-{self.incarnation}",
            incarnation=self.incarnation,
            offers=(RankOffer(manifest, self.transport.address()),),
            digest=pairing_digest([manifest]),
            policy=POLICY,
        )
        self.events: queue.SimpleQueue[object] = queue.SimpleQueue()
        self.seen: list[object] = []
        self.loop: AgentLoop[object] = AgentLoop(self.channel, self.transport)

    def expect(self, kind: type[Event], transfer: TransferId | None = None) -> Event:
        """The next event of ``kind`` (of ``transfer``); others that come before stay to be expected later."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for event in self.seen:
                if isinstance(event, kind) and transfer in (None, event.transfer):  # type: ignore[attr-defined]
                    self.seen.remove(event)
                    return event
            left = deadline - time.monotonic()
            assert left > 0, f"no {kind.__name__}; what came: {self.seen}"
            try:
                self.seen.append(self.events.get(timeout=left))
            except queue.Empty:
                continue

    def statistics(self) -> e.AgentStatistics:
        answer: queue.SimpleQueue[e.AgentStatistics] = queue.SimpleQueue()
        self.loop.post(e.Inspect(answer.put))
        return answer.get(timeout=PATIENCE_S)

    def crashed(self, exc: BaseException) -> None:
        self.events.put(exc)

    def close(self) -> None:
        self.loop.stop()
        assert self.loop.crashed is None, self.loop.crashed


class PrefillSide(AgentSide):
    def __init__(self, *, port: int = 0, fill_probe: bool = True, **options: object) -> None:
        super().__init__("prefill", **options)  # type: ignore[arg-type]
        if fill_probe:
            self.probe.fill(self.incarnation)
        self.control = self.channel.bind(f"tcp://127.0.0.1:{port}")
        self.loop.start(PrefillAgent(self.identity, self.channel, self.events.put), self.crashed)  # type: ignore[arg-type]

    def expect_transfer(self, transfer: TransferId, num_tokens: int = 300) -> None:
        self.loop.post(e.ExpectTransfer(transfer, num_tokens, 30.0))

    def write(self, pages: tuple[int, ...], seed: int) -> None:
        """Random bytes into every region of ``pages``, as an engine would write them."""
        generator = torch.Generator().manual_seed(seed)
        for slot in self.arena.layout.slots:
            for page in pages:
                target = self.arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, page)
                target.copy_(torch.randint(0, 256, target.shape, generator=generator, dtype=torch.uint8))

    def serve(self, transfer: TransferId, pages: tuple[int, ...], num_tokens: int = 300) -> None:
        """All that a prefill engine does for one request."""
        self.expect_transfer(transfer, num_tokens)
        self.expect(e.PrefillWanted, transfer)
        self.loop.post(e.GrantPages(transfer, pages, 0))
        for tokens in range(128, num_tokens, 128):
            self.loop.post(e.RaiseWatermark(transfer, tokens))
        self.loop.post(e.FinishPrefill(transfer, 42, -0.5, b"more"))


class DecodeSide(AgentSide):
    def __init__(self, *, least_path: str | None = None, **options: object) -> None:
        super().__init__("decode", **options)  # type: ignore[arg-type]
        reads = RankReads(self.transport, self.identity.manifest, self.probe, (self.arena.memory.address,))
        ranks = RankGroup(reads)
        links = PeerLinks(self.identity, self.channel, ranks, PathRequirement(least_path))
        agent = DecodeAgent(self.identity, self.channel, ranks, links, self.events.put)
        self.loop.start(agent, self.crashed)  # type: ignore[arg-type]

    def fetch(
        self,
        transfer: TransferId,
        prefill: PrefillSide,
        pages: tuple[int, ...],
        *,
        num_tokens: int = 300,
        incarnation: Incarnation | None = None,
        deadline_s: float = 30.0,
    ) -> None:
        life = incarnation or prefill.incarnation
        self.loop.post(e.StartTransfer(transfer, prefill.control, life, pages, num_tokens, deadline_s))

    def expect_failure(self, transfer: TransferId) -> e.TransferFailed:
        """The failure, and the pages back after it."""
        failed = self.expect(e.TransferFailed, transfer)
        self.expect(e.PagesReturned, transfer)
        assert isinstance(failed.code, FailureCode)
        return failed


def same_bytes(prefill: AgentSide, theirs: tuple[int, ...], decode: AgentSide, ours: tuple[int, ...]) -> bool:
    """Whether every byte of every region of every page is equal."""
    return all(
        np.array_equal(
            prefill.arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, p).numpy(),
            decode.arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, d).numpy(),
        )
        for slot in prefill.arena.layout.slots
        for p, d in zip(theirs, ours, strict=True)
    )
