"""Which spans to read: regions of two workers matched by name, layer and head, merged where both sides are adjacent.

A plan is made once a pair of workers; turning it into spans for some pages is arithmetic on arrays.
"""

from collections.abc import Sequence
from typing import Self

import msgspec
import numpy as np

from pdkv.core.manifest import region_keys
from pdkv.schema import ALL_LAYERS, Int64Array, LayerRange, Manifest, ReadBatch, Region, RegionKey


class Piece(msgspec.Struct, frozen=True, order=True):
    """Bytes of every page that are contiguous on both sides: page p of the source lies at ``source_offset + p *
    source_stride`` in memory ``source_memory`` of rank ``source_rank``, and likewise locally."""

    source_rank: int
    source_memory: int
    source_offset: int
    source_stride: int
    local_memory: int
    local_offset: int
    local_stride: int
    length: int
    padding: int = 0
    """Bytes behind the last region of a row that may be read and written along, on both sides."""

    @property
    def whole_row(self) -> bool:
        """Nothing but padding lies between this piece's end and its start in the next page, on both sides."""
        return self.source_stride == self.local_stride and 0 <= self.source_stride - self.length <= self.padding


class Part(msgspec.Struct, frozen=True):
    """One region of one layer and head, before it is merged with its neighbours."""

    name: str
    layer: int
    head: int
    piece: Piece


class TransferPlan(msgspec.Struct, frozen=True):
    """How one rank of D reads any page from the ranks of one P."""

    parts: tuple[Part, ...]
    """In the order of their places."""
    pieces: tuple[Piece, ...]
    """The same, merged where they touch on both sides."""
    source_pages: int
    """Pages of P's arena: a page number at or beyond it is refused."""
    local_pages: int
    num_regions: int
    """Regions (name, layer, head) that travel."""
    bytes_per_page: int
    bytes_by_region: dict[str, int]
    """Bytes of one page by region name."""

    @classmethod
    def between(cls, source: Sequence[Manifest], local: Manifest) -> Self:
        """Match every region of ``local`` with the rank of ``source`` (all ranks, in order) that is to serve it.

        What several ranks of P hold (replicated regions, heads when there are more ranks than heads) is read from the
        holder nearest to P's rank at the same share of the way as this rank of D: so ranks of D spread over the ranks
        of P, each reads its index keys from one rank, and where that rank also serves its first heads, both lie in
        one run. Raises ``KeyError`` for a region that no rank holds; ``check_pairing`` has refused such a pair before.
        """
        holders = _holders(source)
        nearest = local.tp_rank * len(source) // local.tp_size
        parts = []
        for region in local.regions:
            for key, offset in _parts(region):
                rank, (theirs, their_offset) = min(holders[key], key=lambda held: (abs(held[0] - nearest), held[0]))
                length = region.bytes_per_page // region.num_heads
                piece = Piece(
                    source_rank=rank,
                    source_memory=theirs.memory,
                    source_offset=their_offset,
                    source_stride=theirs.page_stride,
                    local_memory=region.memory,
                    local_offset=offset,
                    local_stride=region.page_stride,
                    length=length,
                    padding=min(source[rank].row_padding, local.row_padding),
                )
                parts.append(Part(key.name, key.layer, key.head, piece))
        parts.sort(key=lambda part: part.piece)
        return cls._of(parts, min(manifest.num_pages for manifest in source), local.num_pages)

    @classmethod
    def _of(cls, parts: Sequence[Part], source_pages: int, local_pages: int) -> Self:
        bytes_by_region: dict[str, int] = {}
        for part in parts:
            bytes_by_region[part.name] = bytes_by_region.get(part.name, 0) + part.piece.length
        return cls(
            parts=tuple(parts),
            pieces=tuple(_merge_adjacent([part.piece for part in parts])),
            source_pages=source_pages,
            local_pages=local_pages,
            num_regions=len(parts),
            bytes_per_page=sum(bytes_by_region.values()),
            bytes_by_region=bytes_by_region,
        )

    def of_layers(self, layers: LayerRange) -> Self:
        """The plan of these layers alone: of arena rows one piece a run of heads and one of index keys. It may be one
        of nothing."""
        if layers == ALL_LAYERS:
            return self
        return self._of([part for part in self.parts if part.layer in layers], self.source_pages, self.local_pages)

    @property
    def source_ranks(self) -> tuple[int, ...]:
        """The ranks of P that anything is read from, ascending."""
        return tuple(sorted({piece.source_rank for piece in self.pieces}))

    def reads(
        self, source_pages: Sequence[int], local_pages: Sequence[int], local_bases: Sequence[int]
    ) -> dict[int, ReadBatch]:
        """Spans that bring ``source_pages[i]`` into ``local_pages[i]``, by rank of P.

        ``local_bases`` are the addresses of the local memories. Runs of pages that are contiguous on both sides become
        one span where a piece fills the row. Raises ``ValueError`` for pages that either arena does not have.
        """
        theirs = np.asarray(source_pages, dtype=np.int64)
        ours = np.asarray(local_pages, dtype=np.int64)
        if theirs.shape != ours.shape or theirs.ndim != 1:
            raise ValueError(f"{theirs.size} source pages for {ours.size} local pages")
        _check_pages(theirs, self.source_pages, "source")
        _check_pages(ours, self.local_pages, "local")
        starts, counts = _runs(theirs, ours)
        by_rank: dict[int, list[tuple[Int64Array, Int64Array, Int64Array, Int64Array]]] = {}
        for piece in self.pieces:
            first = starts if piece.whole_row else np.arange(theirs.size)
            pages = counts if piece.whole_row else np.ones(theirs.size, dtype=np.int64)
            local = local_bases[piece.local_memory] + piece.local_offset + ours[first] * piece.local_stride
            by_rank.setdefault(piece.source_rank, []).append(
                (
                    np.full(first.size, piece.source_memory, dtype=np.int64),
                    piece.source_offset + theirs[first] * piece.source_stride,
                    local,
                    (pages - 1) * piece.source_stride + piece.length,
                )
            )
        return {rank: ReadBatch(*map(np.concatenate, zip(*arrays, strict=True))) for rank, arrays in by_rank.items()}


def _parts(region: Region) -> list[tuple[RegionKey, int]]:
    """The keys of a region with the offset of each one's page 0: heads lie one after another."""
    per_head = region.bytes_per_page // region.num_heads
    return [(key, region.offset + i * per_head) for i, key in enumerate(region_keys(region))]


def _holders(source: Sequence[Manifest]) -> dict[RegionKey, list[tuple[int, tuple[Region, int]]]]:
    holders: dict[RegionKey, list[tuple[int, tuple[Region, int]]]] = {}
    for rank, manifest in enumerate(source):
        for region in manifest.regions:
            for key, offset in _parts(region):
                holders.setdefault(key, []).append((rank, (region, offset)))
    return holders


def _merge_adjacent(pieces: list[Piece]) -> list[Piece]:
    """``pieces`` are sorted."""
    merged: list[Piece] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and _adjacent(last, piece):
            merged[-1] = msgspec.structs.replace(last, length=last.length + piece.length)
        else:
            merged.append(piece)
    return merged


def _adjacent(a: Piece, b: Piece) -> bool:
    same = (a.source_rank, a.source_memory, a.source_stride, a.local_memory, a.local_stride) == (
        b.source_rank,
        b.source_memory,
        b.source_stride,
        b.local_memory,
        b.local_stride,
    )
    return same and a.source_offset + a.length == b.source_offset and a.local_offset + a.length == b.local_offset


def _runs(theirs: Int64Array, ours: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Where runs start that are contiguous on both sides, and how many pages each has."""
    if theirs.size == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    breaks = (np.diff(theirs) != 1) | (np.diff(ours) != 1)
    starts = np.concatenate(([0], np.flatnonzero(breaks) + 1)).astype(np.int64)
    return starts, np.diff(np.concatenate((starts, [theirs.size]))).astype(np.int64)


def _check_pages(pages: Int64Array, num_pages: int, side: str) -> None:
    bad = pages[(pages < 0) | (pages >= num_pages)]
    if bad.size:
        raise ValueError(f"{side} page {int(bad[0])} is outside the arena of {num_pages} pages")


def spans_without_merging(plan: TransferPlan, num_pages: int) -> int:
    """Descriptors a mover needs that knows neither rows nor runs: pages x regions."""
    return plan.num_regions * num_pages
