"""Digests: the kernel equals the reference bit for bit, and each thing that matters changes them."""

from dataclasses import fields, replace

import pytest
import torch
from pdkv_kernels.page_digest import page_digest
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions, page_digest_ref
from torch import Tensor

from tests.kernels.decode_case import on


def whole(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


REGIONS = DigestRegions(whole(0, 4096, 12288, 16384), whole(32, 64, 4, 12), whole(1, 2, 7, 2), whole(3, 4, 59, 4))
PAGES = DigestPages(whole(5, 0, 3, 1), whole(0, 1, 900, 3), whole(128, 128, 57, 1))


def rows() -> Tensor:
    return torch.randint(0, 256, (6, 20480), dtype=torch.uint8)


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", torch.uint8), on("cuda", torch.uint8)])
def test_equals_the_reference(device: str, dtype: torch.dtype):
    memory = rows()
    regions = DigestRegions(*(getattr(REGIONS, field.name).to(device) for field in fields(REGIONS)))
    pages = DigestPages(*(getattr(PAGES, field.name).to(device) for field in fields(PAGES)))
    got = page_digest(memory.to(device), regions, pages).cpu()
    assert torch.equal(got, page_digest_ref(memory, REGIONS, PAGES))


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", torch.uint8), on("cuda", torch.uint8)])
@pytest.mark.parametrize("tokens", [[128] * 9, [128] * 8 + [1], [128, 57, 128]])
def test_pages_that_share_a_program_may_be_full_or_not(device: str, dtype: torch.dtype, tokens: list[int]):
    memory = torch.randint(0, 256, (9, 8192), dtype=torch.uint8)
    regions = [whole(0, 4096), whole(32, 4), whole(1, 2), whole(3, 4)]
    pages = [torch.randperm(9)[: len(tokens)], torch.arange(len(tokens)), whole(*tokens)]
    got = page_digest(
        memory.to(device), DigestRegions(*(t.to(device) for t in regions)), DigestPages(*(t.to(device) for t in pages))
    )
    assert torch.equal(got.cpu(), page_digest_ref(memory, DigestRegions(*regions), DigestPages(*pages)))


def test_known_answer():
    """The digest is an agreement between workers of any version: it must not change."""
    memory = (torch.arange(6 * 20480) * 7 % 251).to(torch.uint8).view(6, 20480)
    assert page_digest_ref(memory, REGIONS, PAGES)[0, 0].tolist() == KNOWN


KNOWN = [-8568501939672906200, 6104579413003750984]


def one(
    memory: Tensor, *, offset: int = 0, region: int = 1, layer: int = 3, block: int = 0, tokens: int = 128
) -> list[int]:
    regions = DigestRegions(whole(offset), whole(32), whole(region), whole(layer))
    return page_digest_ref(memory, regions, DigestPages(whole(2), whole(block), whole(tokens)))[0, 0].tolist()


def test_region_layer_block_and_length_are_part_of_it():
    memory = rows()
    digests = [one(memory), one(memory, region=2), one(memory, layer=4), one(memory, block=1), one(memory, tokens=127)]
    for lane in range(2):
        assert len({digest[lane] for digest in digests}) == 5


def test_every_bit_that_counts_changes_both_halves_and_no_other_does():
    memory = rows()
    before = one(memory, tokens=57)
    for byte in [0, 1, 511, 512, 1023, 1024, 57 * 32 - 1]:
        memory[2, byte] ^= 1 << (byte % 8)
        after = one(memory, tokens=57)
        assert after[0] != before[0]
        assert after[1] != before[1]
        memory[2, byte] ^= 1 << (byte % 8)
    memory[2, 57 * 32 :] = 0xFF
    memory[[0, 1, 3, 4, 5]] = 0xFF
    assert one(memory, tokens=57) == before


def test_swapped_words_tokens_and_regions_are_seen():
    memory = rows()
    before = one(memory)
    for first, second, size in [(0, 4, 4), (0, 512, 4), (64, 96, 32), (1024, 2048, 1024)]:
        swapped = memory.clone()
        swapped[2, first : first + size] = memory[2, second : second + size]
        swapped[2, second : second + size] = memory[2, first : first + size]
        assert one(swapped) != before
    same_bytes = memory.clone()
    same_bytes[2, 8192:12288] = memory[2, :4096]
    assert one(same_bytes, offset=8192) == before
    assert one(same_bytes, offset=8192, region=2) != before


def test_nothing_to_do():
    none = replace(PAGES, page=whole(), block=whole(), num_tokens=whole())
    assert page_digest(rows(), REGIONS, none).shape == (4, 0, 2)
    assert page_digest_ref(rows(), REGIONS, none).shape == (4, 0, 2)
