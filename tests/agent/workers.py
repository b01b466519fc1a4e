"""A prefill and a decode worker as agents in one process: real channels, threads and arenas, no model."""

import functools
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import torch

from pdkv.agent import events as e
from pdkv.agent.decode_agent import DecodeAgent
from pdkv.agent.digest_group import DigestGroup
from pdkv.agent.loop import AgentLoop
from pdkv.agent.page_checker import PageCheck, PageChecker
from pdkv.agent.paths import PathRequirement
from pdkv.agent.peer_links import PeerLinks
from pdkv.agent.prefill_agent import PrefillAgent
from pdkv.agent.rank_digests import DigestPages, PageDigests, RankDigests
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import RankOrder, RankReads
from pdkv.core.events import SessionPolicy
from pdkv.core.lease import LeasePolicy
from pdkv.core.manifest import pairing_digest
from pdkv.core.pull_queue import PullRate
from pdkv.core.residency import BlockRange
from pdkv.daemons.assembly import new_incarnation
from pdkv.daemons.inbox import Inbox
from pdkv.errors import FailureCode
from pdkv.memory.arena import Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.page_digests import ArenaDigests
from pdkv.memory.probe import ProbePages
from pdkv.memory.row import RowLayout, RowSlot
from pdkv.schema import Incarnation, Manifest, TransferId, VerifyPages
from pdkv.transport.base import Transport
from pdkv.transport.inproc import InprocTransport
from pdkv.wire.admission import ChannelSecurity, NoSecurity
from pdkv.wire.channel import Channel
from pdkv.wire.messages import RankOffer
from tests.layouts import make_layout

KV = make_layout(num_layers=3, num_dense=1, kv_dtype="float32", index_dtype="float32", head_dim=16)
POLICY = SessionPolicy(LeasePolicy(ttl_s=2.0, margin_s=0.2, renew_every_s=0.5), close_grace_s=0.3)
PATIENCE_S = 60.0

Event = TypeVar("Event")


class OtherRank:
    """A rank other than 0: an arena and a transport, and a thread that does as rank 0 orders."""

    def __init__(self, rank: int, size: int, num_pages: int, transport: Transport | None) -> None:
        self.rank = rank
        self.arena = Arena.allocate(RowLayout.of(KV, rank, size), num_pages)
        self.probe = ProbePages(self.arena)
        self.transport = transport or InprocTransport()
        self.transport.register(self.arena.memory)
        self.manifest = build_manifest(self.arena, KV, "model")
        self.offer = RankOffer(self.manifest, self.transport.address())
        self.orders = Inbox[RankOrder | DigestPages | None]()
        self._thread: threading.Thread | None = None

    def start(self, report: Callable[[e.RankReported], None]) -> None:
        self._thread = threading.Thread(target=self._obey, args=(report,))
        self._thread.start()

    def close(self) -> None:
        if self._thread is not None:
            self.orders.put(None)
            self._thread.join()
        self.transport.close()

    def _obey(self, report: Callable[[e.RankReported], None]) -> None:
        reads = RankReads(self.transport, self.manifest, self.probe, (self.arena.memory.address,))
        tell = functools.partial(e.RankReported, self.rank)
        digests = RankDigests(self.manifest, ArenaDigests(self.arena), lambda told: report(tell(told)))
        while True:
            reports = reads.on_completions(self.transport.poll())
            for order in self.orders.take(0.001):
                if order is None:
                    digests.close()
                    return
                if isinstance(order, DigestPages):
                    digests.obey(order)
                else:
                    reports += reads.obey(order)
            for told in reports:
                report(tell(told))


class AgentSide:
    """What both roles have: an arena, an identity, a running loop, and the events that came out of it."""

    def __init__(
        self,
        role: str,
        *,
        name: str | None = None,
        num_pages: int = 20,
        transport: Transport | None = None,
        other_transports: Sequence[Transport | None] = (),
        num_offered: int | None = None,
        change: Callable[[Manifest], Manifest] = lambda manifest: manifest,
        security: ChannelSecurity | None = None,
    ) -> None:
        self.incarnation = new_incarnation()
        size = 1 + len(other_transports)
        self.others = [OtherRank(i + 1, size, num_pages, other) for i, other in enumerate(other_transports)]
        self.arena = Arena.allocate(RowLayout.of(KV, 0, size), num_pages)
        self.probe = ProbePages(self.arena)
        self.transport = transport or InprocTransport()
        self.transport.register(self.arena.memory)
        self.channel = Channel(self.incarnation, security or NoSecurity())
        manifest = change(build_manifest(self.arena, KV, "model"))
        offers = (RankOffer(manifest, self.transport.address()), *(other.offer for other in self.others))
        self.identity = e.WorkerIdentity(
            name=name or f"{role}-{self.incarnation}",
            incarnation=self.incarnation,
            offers=offers[:num_offered],
            digest=pairing_digest([offer.manifest for offer in offers]),
            policy=POLICY,
        )
        self.events: queue.Queue[object] = queue.Queue()  # whose ``get`` waits no longer than it is told to
        self.seen: list[object] = []
        self.loop: AgentLoop[object] = AgentLoop(self.channel, self.transport)

    @property
    def arenas(self) -> list[Arena]:
        """Of all ranks."""
        return [self.arena, *(other.arena for other in self.others)]

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

    def digests(self) -> RankDigests:
        """Rank 0's."""
        report = functools.partial(e.RankReported, 0)
        return RankDigests(self.identity.manifest, self.page_digests(), lambda told: self.loop.post(report(told)))

    def page_digests(self) -> PageDigests:
        return ArenaDigests(self.arena)

    def crashed(self, exc: BaseException) -> None:
        self.events.put(exc)

    def close(self) -> None:
        for other in self.others:  # first, as a worker does: they report to the loop
            other.close()
        self.loop.stop()
        assert self.loop.crashed is None, self.loop.crashed


class PrefillSide(AgentSide):
    def __init__(self, *, port: int = 0, fill_probe: bool = True, can_digest: bool = True, **options: object) -> None:
        super().__init__("prefill", **options)  # type: ignore[arg-type]
        if fill_probe:
            for probe in (self.probe, *(other.probe for other in self.others)):
                probe.fill(self.incarnation)
        self.control = self.channel.bind(f"tcp://127.0.0.1:{port}")
        orders = [other.orders.put for other in self.others]
        digests: DigestGroup[tuple[TransferId, BlockRange]] = DigestGroup(self.digests(), orders)
        agent = PrefillAgent(self.identity, self.channel, self.events.put, digests if can_digest else None)
        self.loop.start(agent, self.crashed)  # type: ignore[arg-type]
        for other in self.others:
            other.start(self.loop.post)

    def expect_transfer(self, transfer: TransferId, num_tokens: int = 300) -> None:
        self.loop.post(e.ExpectTransfer(transfer, num_tokens, 30.0))

    def write(self, pages: tuple[int, ...], seed: int) -> None:
        """Random bytes into every region of ``pages``, as an engine would write them: equal on ranks that share one."""
        drawn: dict[tuple[str, int, int, int], torch.Tensor] = {}
        generator = torch.Generator().manual_seed(seed)
        for arena in self.arenas:
            for slot in arena.layout.slots:
                for page in pages:
                    key = (slot.spec.name, slot.spec.layer, slot.head, page)
                    if key not in drawn:
                        drawn[key] = torch.randint(0, 256, (slot.num_bytes,), generator=generator, dtype=torch.uint8)
                    arena.page_bytes(*key).copy_(drawn[key])

    def serve(self, transfer: TransferId, pages: tuple[int, ...], num_tokens: int = 300) -> None:
        """All that a prefill engine does for one request."""
        self.expect_transfer(transfer, num_tokens)
        self.expect(e.PrefillWanted, transfer)
        self.loop.post(e.GrantPages(transfer, pages, 0))
        for tokens in range(128, num_tokens, 128):
            self.loop.post(e.RaiseWatermark(transfer, tokens))
        self.loop.post(e.FinishPrefill(transfer, 42, -0.5, b"more"))


class DecodeSide(AgentSide):
    def __init__(
        self,
        *,
        least_path: str | None = None,
        pull_bytes_per_s: float = 0.0,
        verify: VerifyPages = VerifyPages.OFF,
        **options: object,
    ) -> None:
        super().__init__("decode", **options)  # type: ignore[arg-type]
        rate = PullRate(pull_bytes_per_s) if pull_bytes_per_s else None
        reads = RankReads(self.transport, self.identity.manifest, self.probe, (self.arena.memory.address,))
        ranks = RankGroup(reads, [other.orders.put for other in self.others])
        links = PeerLinks(self.identity, self.channel, ranks, PathRequirement(least_path))
        checker = None
        if verify is not VerifyPages.OFF:
            digests: DigestGroup[PageCheck] = DigestGroup(self.digests(), [other.orders.put for other in self.others])
            checker = PageChecker(verify, digests, self.identity.manifests, links.meter)
        agent = DecodeAgent(self.identity, self.channel, ranks, links, self.events.put, rate, checker)
        self.loop.start(agent, self.crashed)  # type: ignore[arg-type]
        for other in self.others:
            other.start(self.loop.post)

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
    """Whether every byte of every region of every page is equal, on every rank of D."""
    return all(
        np.array_equal(
            _page(prefill, slot, p).numpy(),
            arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, d).numpy(),
        )
        for arena in decode.arenas
        for slot in arena.layout.slots
        for p, d in zip(theirs, ours, strict=True)
    )


def _page(side: AgentSide, slot: RowSlot, page: int) -> torch.Tensor:
    """One region's bytes, of the first rank that holds it."""
    key = (slot.spec.name, slot.spec.layer, slot.head)
    for arena in side.arenas:
        if any(key == (s.spec.name, s.spec.layer, s.head) for s in arena.layout.slots):
            return arena.page_bytes(*key, page)
    raise AssertionError(f"nobody holds {key}")
