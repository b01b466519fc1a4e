"""A transport that watches what is read, and loses a region of it on request without anybody's noticing."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Self

import msgspec
import numpy as np

from pdkv.errors import ConfigError
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from pdkv.schema import (
    Int64Array,
    LocalMemory,
    MemoryDescriptor,
    ReadBatch,
    RegionKey,
    TransportAddress,
)
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport


class Kind(StrEnum):
    DROP = "drop"
    """The region's spans are skipped, and believed to have come: the pages keep what another prompt left there."""
    ZERO = "zero"
    """The region's bytes are zeroed after they came."""


class Mutation(msgspec.Struct, frozen=True):
    """What happens to one kind of region, in all layers and heads."""

    kind: Kind
    region: str

    @classmethod
    def parse(cls, text: str, regions: Sequence[str]) -> Self:
        """From "drop:index_k". Raises ``ConfigError`` that lists what there is."""
        kind, colon, region = text.partition(":")
        if not colon or kind not in set(Kind) or region not in regions:
            known = ", ".join(sorted(regions))
            raise ConfigError(f"--mutate {text!r}: expected drop:REGION or zero:REGION, REGION one of {known}")
        return cls(Kind(kind), region)

    def __str__(self) -> str:
        return f"{self.kind}:{self.region}"


class RowPair(msgspec.Struct, frozen=True):
    """One block of a transfer: P's page and the page of D that it was read into."""

    source_page: int
    page: int


class WitnessTransport(Transport):
    """D's transport with a witness before it. Owned by D's agent thread; ``watch`` and ``rows`` are for whoever asks,
    between two requests."""

    def __init__(self, inner: Transport) -> None:
        self.name = inner.name
        self.rows: list[RowPair] = []
        self._inner = inner
        self._arena: Arena | None = None
        self._watching = False
        self._mutation: Mutation | None = None
        self._posted: dict[ReadId, Int64Array] = {}

    def attach(self, arena: Arena) -> None:
        """The arena that is read into; known only after the transport was made."""
        self._arena = arena

    def watch(self, mutation: Mutation | None) -> None:
        """From here on remember what is read, and lose it as ``mutation`` says."""
        self.rows = []
        self._mutation = mutation
        self._watching = True

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        if not self._watching:
            return self._inner.submit(peer, batch)
        arena = self._known_arena()
        rows = rows_of(batch, arena.layout.pitch)
        pages = (rows.local - arena.memory.address) // arena.layout.pitch
        sources = rows.remote // arena.layout.pitch
        pairs = [RowPair(int(s), int(p)) for s, p in zip(sources, pages, strict=True)]
        self.rows = list(dict.fromkeys([*self.rows, *pairs]))  # layer groups of a block come one after another
        mutation = self._mutation
        if mutation is not None and mutation.kind is Kind.DROP:
            within = (rows.local - arena.memory.address) % arena.layout.pitch
            batch = without_region(rows, within, arena.layout, mutation.region)
        read = self._inner.submit(peer, batch)
        self._posted[read] = pages
        return read

    def poll(self) -> list[Completion]:
        completions = self._inner.poll()
        for completion in completions:
            pages = self._posted.pop(completion.read, None)
            mutation = self._mutation
            if pages is None or mutation is None or completion.status is not ReadStatus.OK:
                continue
            if mutation.kind is Kind.ZERO:
                self._zero(mutation.region, pages)
        return completions

    def register(self, memory: LocalMemory) -> MemoryDescriptor:
        return self._inner.register(memory)

    def address(self) -> TransportAddress:
        return self._inner.address()

    def connect(self, address: TransportAddress) -> PeerId:
        return self._inner.connect(address)

    def close_peer(self, peer: PeerId) -> None:
        self._inner.close_peer(peer)

    def fileno(self) -> int:
        return self._inner.fileno()

    def path(self, peer: PeerId) -> str:
        return self._inner.path(peer)

    def note(self, peer: PeerId) -> str:
        return self._inner.note(peer)

    def crawls(self, peer: PeerId) -> bool:
        return self._inner.crawls(peer)

    def close(self) -> None:
        self._inner.close()

    def _known_arena(self) -> Arena:
        assert self._arena is not None, "attach() comes before watch()"
        return self._arena

    def _zero(self, region: str, pages: Int64Array) -> None:
        arena = self._known_arena()
        for slot in arena.layout.slots:
            if slot.spec.name == region:
                for page in pages.tolist():
                    arena.page_bytes(region, slot.spec.layer, slot.head, page).zero_()


def rows_of(batch: ReadBatch, pitch: int) -> ReadBatch:
    """The same spans with runs of rows cut into single ones: no span longer than a row."""
    counts = -(-batch.length // pitch)
    ordinal = np.arange(int(counts.sum()), dtype=np.int64) - np.repeat(np.cumsum(counts) - counts, counts)
    left = np.repeat(batch.length, counts) - ordinal * pitch
    return ReadBatch(
        memory=np.repeat(batch.memory, counts),
        remote=np.repeat(batch.remote, counts) + ordinal * pitch,
        local=np.repeat(batch.local, counts) + ordinal * pitch,
        length=np.minimum(left, pitch),
    )


def without_region(rows: ReadBatch, within: Int64Array, layout: RowLayout, region: str) -> ReadBatch:
    """Spans of single rows, which begin ``within`` bytes behind their rows' starts, with every slot of one region cut
    out."""
    kept: list[tuple[int, int]] = []
    for slot in layout.slots:
        if slot.spec.name == region:
            continue
        if kept and kept[-1][1] == slot.offset:
            kept[-1] = (kept[-1][0], slot.offset + slot.num_bytes)
        else:
            kept.append((slot.offset, slot.offset + slot.num_bytes))
    # Of each span what each run of kept slots has in common with it: [num_spans, num_kept].
    starts = np.maximum(np.array([start for start, _ in kept], dtype=np.int64), within[:, None])
    stops = np.minimum(np.array([stop for _, stop in kept], dtype=np.int64), (within + rows.length)[:, None])
    span, run = np.nonzero(stops > starts)
    skipped = starts[span, run] - within[span]
    return ReadBatch(
        memory=rows.memory[span],
        remote=rows.remote[span] + skipped,
        local=rows.local[span] + skipped,
        length=(stops - starts)[span, run],
    )


def differing_blocks(source: Arena, target: Arena, rows: Sequence[RowPair], num_tokens: int) -> dict[RegionKey, int]:
    """In how many blocks each region differs between P's pages and D's, every byte of every prompt token compared.

    Bytes behind the prompt in its last block are nobody's. Regions without a difference are left out.
    """
    block = source.layout.kv.block_size
    found: dict[RegionKey, int] = {}
    for slot in target.layout.slots:
        key = RegionKey(slot.spec.name, slot.spec.layer, slot.head)
        for number, row in enumerate(rows):
            tokens = min(block, num_tokens - number * block)
            theirs = source.page_bytes(key.name, key.layer, key.head, row.source_page).view(block, -1)[:tokens]
            ours = target.page_bytes(key.name, key.layer, key.head, row.page).view(block, -1)[:tokens]
            if not theirs.equal(ours):
                found[key] = found.get(key, 0) + 1
    return found
