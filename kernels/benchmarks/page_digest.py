"""Digests of all regions of many pages of an arena."""

from collections.abc import Iterator

import torch
from pdkv_kernels.page_digest import page_digest
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions
from pdkv_kernels.paged import BLOCK

from benchmarks.arena_case import PITCH_TP4, Rows
from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work

TESTS = ("tests/kernels/test_page_digest.py",)

SHAPES = [16, 256, 1024]
_INDEX_LAYERS, _LAYERS = 57, 60


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: every region of every page once. Rows are those of M3 at TP4 in fp8."""
    for count in SHAPES:
        if wanted(question, f"{count} pages"):
            yield _work(count)
            torch.cuda.empty_cache()


def _work(count: int) -> Work:
    rows = Rows(count, PITCH_TP4)
    memory = rows.take((PITCH_TP4,), torch.uint8)
    kinds = [(0, layer, 128) for layer in range(_INDEX_LAYERS)]
    kinds += [(kind, layer, size) for layer in range(_LAYERS) for kind, size in enumerate((128, 128, 4, 4), start=1)]
    sizes = torch.tensor([size for _, _, size in kinds], device="cuda")
    offsets = (sizes * BLOCK).cumsum(0) - sizes * BLOCK
    region = torch.tensor([kind for kind, _, _ in kinds], device="cuda")
    layer = torch.tensor([layer for _, layer, _ in kinds], device="cuda")
    regions = DigestRegions(offsets, sizes, region, layer)
    numbers = torch.arange(count, device="cuda")
    pages = DigestPages(torch.randperm(count, device="cuda"), numbers, torch.full_like(numbers, BLOCK))
    num_bytes = int(sizes.sum()) * BLOCK * count
    return Work(f"{count} pages", [lambda: page_digest(memory, regions, pages)], num_bytes)
