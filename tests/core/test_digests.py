"""Which digests are made and compared: the sample, the order on the way, and the rank that each is of."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdkv.core.digests import DIGEST_BYTES, SAMPLE_OF, DigestKeys, DigestMap, Rectangle, Wrong, rectangles
from pdkv.core.residency import BlockRange
from pdkv.schema import Manifest, RegionKey, TransferId, VerifyPages
from tests.layouts import make_layout, make_manifest

KV = make_layout(num_layers=20, num_dense=2, kv_dtype="float8_e4m3fn", head_dim=16)
RANKS = (1, 2, 4, 8)


def manifests(size: int, *, rows: bool = True) -> list[Manifest]:
    return [make_manifest(KV, rank, size, rows=rows) for rank in range(size)]


def digested(manifest: Manifest, parts: list[Rectangle], salt: int = 0) -> bytes:
    """Stand-ins for digests, which tell region and block."""
    keys = DigestKeys(manifest)
    found = []
    for part in parts:
        for place in keys.of(part.residue).tolist():
            key = keys.keys[place]
            for block in part.blocks:
                found.append(np.array([hash((key.name, key.layer, key.head)), block + salt], dtype="<i8").tobytes())
    assert len(b"".join(found)) == keys.num_bytes(parts) == DIGEST_BYTES * len(found)
    return b"".join(found)


@given(st.binary(min_size=16, max_size=16), st.integers(1, 70), st.lists(st.integers(1, 20), max_size=8))
def test_the_sample_hangs_on_the_transfer_alone_and_has_all_of_the_last_block(
    raw: bytes, num_blocks: int, cuts: list[int]
) -> None:
    transfer, keys = TransferId(raw), DigestKeys(manifests(1)[0])

    def sampled(blocks: BlockRange) -> set[tuple[int, RegionKey]]:
        parts = rectangles(VerifyPages.SAMPLE, transfer, blocks, num_blocks)
        found = [(b, keys.keys[k]) for part in parts for b in part.blocks for k in keys.of(part.residue).tolist()]
        assert len(set(found)) == len(found)
        return set(found)

    whole = sampled(BlockRange(0, num_blocks))
    edges = sorted({0, num_blocks, *(min(edge, num_blocks) for edge in itertools.accumulate(cuts))})
    assert set().union(*(sampled(BlockRange(*edge)) for edge in itertools.pairwise(edges))) == whole
    assert {key for block, key in whole if block == num_blocks - 1} == set(keys.keys)
    for first in range(num_blocks - SAMPLE_OF):
        run = [key for block, key in whole if first <= block < first + SAMPLE_OF]
        assert sorted(run) == sorted(keys.keys), "any 16 blocks have every layer of every region once"


def test_another_transfer_has_another_sample() -> None:
    blocks = BlockRange(0, 40)
    found = {str(rectangles(VerifyPages.SAMPLE, TransferId(bytes([n] * 16)), blocks, 40)) for n in range(40)}
    assert len(found) == SAMPLE_OF


@pytest.mark.parametrize("verify", [VerifyPages.SAMPLE, VerifyPages.FULL])
@pytest.mark.parametrize("rows", [True, False])
@pytest.mark.parametrize(("p", "d"), [(1, 1), (1, 4), (4, 1), (2, 4), (8, 2), (4, 8)])
def test_every_digest_meets_that_of_the_same_region_and_block(verify: VerifyPages, rows: bool, p: int, d: int) -> None:
    source, local = manifests(p, rows=rows), manifests(d)
    parts = rectangles(verify, TransferId(b"t" * 16), BlockRange(3, 21), 21)
    found = DigestMap.between(source, local)
    theirs, ours = ([digested(m, parts) for m in side] for side in (source, local))
    same = found.compare(parts, theirs, ours)
    assert (same.first_wrong, same.mismatched) == (None, {})
    each = sum(part_size(DigestKeys(m), parts) for m in local)
    assert sum(same.checked.values()) == each
    other = found.compare(parts, theirs, [digested(m, parts, salt=1) for m in local])
    assert other.mismatched == other.checked == same.checked


def part_size(keys: DigestKeys, parts: list[Rectangle]) -> int:
    return keys.num_bytes(parts) // DIGEST_BYTES


def test_the_first_difference_is_named() -> None:
    source, local = manifests(2), manifests(4)
    parts = rectangles(VerifyPages.FULL, TransferId(b"t" * 16), BlockRange(3, 8), 9)
    theirs, ours = ([digested(m, parts) for m in side] for side in (source, local))
    keys = DigestKeys(local[2])
    place = keys.keys.index(RegionKey("v_scale", 7, 2))
    damaged = bytearray(ours[2])
    for block in (6, 4):
        damaged[DIGEST_BYTES * (place * 5 + block - 3)] ^= 1
    ours[2] = bytes(damaged)
    found = DigestMap.between(source, local).compare(parts, theirs, ours)
    assert found.first_wrong == Wrong(4, RegionKey("v_scale", 7, 2))
    assert found.mismatched == {"v_scale": 2}


@pytest.mark.parametrize("change", [lambda d: d[:-1], lambda d: [d[0] + b"x", *d[1:]], lambda d: [d[0][16:], *d[1:]]])
def test_too_few_or_too_many_digests_are_no_digests(change) -> None:
    source, local = manifests(2), manifests(1)
    parts = rectangles(VerifyPages.FULL, TransferId(b"t" * 16), BlockRange(0, 2), 2)
    theirs, ours = ([digested(m, parts) for m in side] for side in (source, local))
    with pytest.raises(ValueError, match="bytes of digests, expected"):
        DigestMap.between(source, local).compare(parts, change(theirs), ours)
