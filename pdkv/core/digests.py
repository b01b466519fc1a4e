"""Which digests of pages are compared, in which order they travel, and which of D's must be equal to which of P's.

A digest is of one block of one region: one name, layer and head. Each rank of P digests what it holds, each rank of D
what it has read, and no two digests are ever added up: a sum would not see two regions that changed places.
"""

import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from pdkv.core.manifest import region_keys
from pdkv.core.plan import TransferPlan
from pdkv.core.residency import BlockRange
from pdkv.schema import Int64Array, Manifest, RegionKey, TransferId, VerifyPages

DIGEST_BYTES = 16
SAMPLE_OF = 16
"""``sample``: one of so many layers of each region of each block, another one in the next block; all of the last block.
"""


class Rectangle(msgspec.Struct, frozen=True):
    """Some blocks, and which regions of each of them: those of one residue, None for all."""

    blocks: tuple[int, ...]
    residue: int | None = None


def rectangles(verify: VerifyPages, transfer: TransferId, blocks: BlockRange, num_blocks: int) -> list[Rectangle]:
    """What is digested of ``blocks`` of a prompt that has ``num_blocks``: both sides make the same of the transfer id.

    Any 16 blocks in a row have every layer of every region in the sample once.
    """
    assert verify is not VerifyPages.OFF, "nothing is digested"
    numbers = range(blocks.start, blocks.stop)
    if verify is VerifyPages.FULL:
        return [Rectangle(tuple(numbers))]
    shift = zlib.crc32(transfer)
    by_residue: dict[int, list[int]] = {}
    for block in numbers:
        if block != num_blocks - 1:
            by_residue.setdefault((block + shift) % SAMPLE_OF, []).append(block)
    found = [Rectangle(tuple(by_residue[residue]), residue) for residue in sorted(by_residue)]
    return [*found, Rectangle((num_blocks - 1,))] if num_blocks - 1 in numbers else found


class DigestKeys:
    """The regions of one rank in the order in which their digests travel: that of its manifest."""

    def __init__(self, manifest: Manifest) -> None:
        self.keys: tuple[RegionKey, ...] = tuple(key for region in manifest.regions for key in region_keys(region))
        self._residues = np.array([_residue(key) for key in self.keys], dtype=np.int64)
        self._of: dict[int | None, Int64Array] = {None: np.arange(len(self.keys), dtype=np.int64)}

    def of(self, residue: int | None) -> Int64Array:
        """Places in ``keys`` of the regions of one residue."""
        if residue not in self._of:
            self._of[residue] = np.flatnonzero(self._residues == residue).astype(np.int64)
        return self._of[residue]

    def num_bytes(self, parts: Iterable[Rectangle]) -> int:
        return DIGEST_BYTES * sum(len(part.blocks) * self.of(part.residue).size for part in parts)


@lru_cache(maxsize=4096)
def _residue(key: RegionKey) -> int:
    """Of a region of a layer, whatever the head: names stand at different places of the cycle."""
    return (key.layer + zlib.crc32(key.name.encode())) % SAMPLE_OF


class Wrong(msgspec.Struct, frozen=True, order=True):
    """A block of a region that is not what P wrote."""

    block: int
    key: RegionKey


class Comparison(msgspec.Struct, frozen=True):
    """What came of comparing. Counts are of digests, by region name."""

    checked: dict[str, int]
    mismatched: dict[str, int]
    first_wrong: Wrong | None
    """Of the lowest block, and there of the first name."""


class DigestMap:
    """Which digest of which rank of P each digest of each rank of D must be equal to: that of the rank it was read
    from."""

    def __init__(self, theirs: list[DigestKeys], ours: list[DigestKeys], sources: list[Int64Array]) -> None:
        """``sources[rank]``: [num_keys, 2], rank of P and place among its keys, for each key of that rank of D."""
        self._theirs = theirs
        self._ours = ours
        self._sources = sources

    @classmethod
    def between(cls, source: Sequence[Manifest], local: Sequence[Manifest]) -> Self:
        """All ranks of P and of D, in order, as ``check_pairing`` has passed them."""
        theirs, ours = [DigestKeys(manifest) for manifest in source], [DigestKeys(manifest) for manifest in local]
        places = [{key: place for place, key in enumerate(keys.keys)} for keys in theirs]
        sources = []
        for manifest, keys in zip(local, ours, strict=True):
            plan = TransferPlan.between(source, manifest)
            rank_of = {RegionKey(part.name, part.layer, part.head): part.piece.source_rank for part in plan.parts}
            found = [(rank_of[key], places[rank_of[key]][key]) for key in keys.keys]
            sources.append(np.array(found, dtype=np.int64).reshape(-1, 2))
        return cls(theirs, ours, sources)

    def compare(self, parts: Sequence[Rectangle], theirs: Sequence[bytes], ours: Sequence[bytes]) -> Comparison:
        """Digests of all ranks of both sides. Raises ``ValueError`` where P's are not as many as they must be."""
        expected = [keys.num_bytes(parts) for keys in self._theirs]
        if [len(digests) for digests in theirs] != expected:
            found = ", ".join(str(len(digests)) for digests in theirs)
            raise ValueError(f"prefill's ranks sent {found} bytes of digests, expected {', '.join(map(str, expected))}")
        sent = [_cut(keys, parts, digests) for keys, digests in zip(self._theirs, theirs, strict=True)]
        tally = _Tally()
        for rank, (keys, digests) in enumerate(zip(self._ours, ours, strict=True)):
            for number, (part, mine) in enumerate(zip(parts, _cut(keys, parts, digests), strict=True)):
                wanted = self._wanted(rank, part, [arrays[number] for arrays in sent], mine)
                tally.add(keys, part, (mine != wanted).any(axis=2))
        return tally.comparison()

    def _wanted(self, rank: int, part: Rectangle, sent: Sequence[Int64Array], mine: Int64Array) -> Int64Array:
        """P's digests in the order of ``mine``: [num_keys, num_blocks, 2]."""
        wanted = np.empty_like(mine)
        sources = self._sources[rank][self._ours[rank].of(part.residue)]
        for source in np.unique(sources[:, 0]).tolist():
            here = np.flatnonzero(sources[:, 0] == source)
            wanted[here] = sent[source][np.searchsorted(self._theirs[source].of(part.residue), sources[here, 1])]
        return wanted


class _Tally:
    def __init__(self) -> None:
        self._checked: Counter[str] = Counter()
        self._mismatched: Counter[str] = Counter()
        self._first: Wrong | None = None

    def add(self, keys: DigestKeys, part: Rectangle, differs: npt.NDArray[np.bool_]) -> None:  # [num_keys, num_blocks]
        chosen = keys.of(part.residue)
        for place, key in enumerate(keys.keys[i] for i in chosen.tolist()):
            self._checked[key.name] += len(part.blocks)
            if differs[place].any():
                wrong = np.flatnonzero(differs[place])
                self._mismatched[key.name] += wrong.size
                found = Wrong(part.blocks[int(wrong[0])], key)
                self._first = found if self._first is None else min(self._first, found)

    def comparison(self) -> Comparison:
        return Comparison(dict(self._checked), dict(self._mismatched), self._first)


def _cut(keys: DigestKeys, parts: Sequence[Rectangle], digests: bytes) -> list[Int64Array]:
    """One rank's digests of each part: [num_keys, num_blocks, 2]."""
    numbers = np.frombuffer(digests, dtype="<i8").reshape(-1, 2)
    arrays, begin = [], 0
    for part in parts:
        shape = keys.of(part.residue).size, len(part.blocks)
        arrays.append(numbers[begin : begin + shape[0] * shape[1]].reshape(*shape, 2))
        begin += shape[0] * shape[1]
    return arrays
