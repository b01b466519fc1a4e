"""Digests of an arena's pages: of the right bytes, named by region, layer, head and block, on any device."""

import zlib
from dataclasses import fields

import numpy as np
import torch
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions

from pdkv.memory.arena import Arena
from pdkv.memory.page_digests import ArenaDigests, region_number
from pdkv.memory.row import RowLayout
from pdkv.schema import DigestPart, Int64Array
from tests.layouts import make_layout

KV = make_layout(num_layers=3, num_dense=1, kv_dtype="float8_e4m3fn", index_dtype="float8_e4m3fn", head_dim=32)
PAGES, BLOCKS, TOKENS = (np.array(numbers, dtype=np.int64) for numbers in ([4, 1], [0, 7], [128, 57]))


def filled(rank: int = 0, size: int = 1, device: str = "cpu") -> Arena:
    """Bytes that hang on the region, layer, head and page, as on any other rank."""
    arena = Arena.allocate(RowLayout.of(KV, rank, size), 6, device)
    for slot in arena.layout.slots:
        for page in PAGES.tolist():
            seed = f"{slot.spec.name} {slot.spec.layer} {slot.head} {page}"
            generator = torch.Generator().manual_seed(zlib.crc32(seed.encode()))
            drawn = torch.randint(0, 256, (slot.num_bytes,), generator=generator, dtype=torch.uint8)
            arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, page).copy_(drawn)
    return arena


def digests(arena: Arena, regions: Int64Array | None = None) -> np.ndarray:  # [num_regions, num_pages, 2]
    wanted = np.arange(len(arena.layout.slots), dtype=np.int64) if regions is None else regions
    found = ArenaDigests(arena).digest([DigestPart(wanted, PAGES, BLOCKS, TOKENS)])
    return np.frombuffer(found, dtype="<i8").reshape(wanted.size, PAGES.size, 2)


def test_a_region_has_the_same_digest_on_every_rank_that_holds_it() -> None:
    whole = filled()
    of_whole = {(s.spec.name, s.spec.layer, s.head): d for s, d in zip(whole.layout.slots, digests(whole), strict=True)}
    for rank in range(4):
        arena = filled(rank, 4)
        for slot, digest in zip(arena.layout.slots, digests(arena), strict=True):
            assert (digest == of_whole[slot.spec.name, slot.spec.layer, slot.head]).all()
    assert len({digest.tobytes() for digest in of_whole.values()}) == len(whole.layout.slots)


def test_each_digest_hangs_on_its_own_bytes_and_on_no_others() -> None:
    arena = filled()
    before = digests(arena)
    for place, slot in enumerate(arena.layout.slots):
        piece = arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, 1)
        valid = slot.num_bytes * 57 // 128
        piece[valid - 1] ^= 1
        if valid < slot.num_bytes:
            piece[valid] ^= 1
        changed = (digests(arena) != before).any(axis=2)
        assert np.argwhere(changed).tolist() == [[place, 1]]
        piece[valid - 1] ^= 1


def test_some_regions_alone() -> None:
    arena = filled()
    some = np.array([5, 2, 20], dtype=np.int64)
    assert (digests(arena, some) == digests(arena)[some]).all()


def test_parts_follow_one_another() -> None:
    arena = filled()
    regions = [np.array(numbers, dtype=np.int64) for numbers in ([5, 2], [20], [5, 2])]
    where = PAGES[1:], BLOCKS[1:], TOKENS[1:]
    parts = [DigestPart(regions[0], PAGES, BLOCKS, TOKENS), *(DigestPart(some, *where) for some in regions[1:])]
    whole = digests(arena)
    wanted = [whole[regions[0]], whole[regions[1], 1:], whole[regions[2], 1:]]
    assert ArenaDigests(arena).digest(parts) == b"".join(part.astype("<i8").tobytes() for part in wanted)


def test_a_kernel_gets_every_array_where_one_compilation_serves() -> None:
    """Triton compiles another kernel for each array that does not begin at a multiple of 16 bytes."""
    found: list[int] = []

    def operation(_rows: torch.Tensor, regions: DigestRegions, pages: DigestPages) -> torch.Tensor:
        for told in (regions, pages):
            for field in fields(told):
                array: torch.Tensor = getattr(told, field.name)
                assert array.is_contiguous()
                found.append(array.data_ptr() % 16)
        return torch.zeros(regions.offset.numel(), pages.page.numel(), 2, dtype=torch.int64)

    digests_of = ArenaDigests(filled())
    digests_of._operation = operation
    counts = [np.arange(count, dtype=np.int64) for count in range(1, 6)]
    digests_of.digest([DigestPart(some, few, few, few) for some in counts for few in counts])
    assert found == [0] * (7 * len(counts) ** 2)


def test_numbers_of_regions_tell_names_and_heads_apart() -> None:
    regions = list(filled().regions())
    assert len({region_number(region) for region in regions}) == len({(r.name, r.head_start) for r in regions})
