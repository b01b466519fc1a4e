"""Digests of many regions of many pages in one launch; keys of words are made once for several pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.page_digest_ref import MIX_SEEDS, PAIR, WORD_SEEDS, DigestPages, DigestRegions

_PAGES_PER_PROGRAM = 8


def page_digest(rows: Tensor, regions: DigestRegions, pages: DigestPages) -> Tensor:
    """``page_digest_ref``, bit for bit: int64 [num_regions, num_pages, 2]. Bytes are read in place, no host sync."""
    num_regions, num_pages = regions.offset.numel(), pages.page.numel()
    assert rows.stride(1) == 1
    assert rows.stride(0) % 4 == 0
    out = torch.empty(num_regions, num_pages, 2, dtype=torch.int64, device=rows.device)
    if out.numel() == 0:
        return out
    words = rows.view(torch.int32)
    _page_digest[(triton.cdiv(num_pages, _PAGES_PER_PROGRAM), num_regions)](
        words, regions.offset, regions.token_bytes, regions.region, regions.layer,
        pages.page, pages.block, pages.num_tokens, out, words.stride(0), num_pages,
        SEED_0=WORD_SEEDS[0], SEED_1=WORD_SEEDS[1], MIX_0=MIX_SEEDS[0], MIX_1=MIX_SEEDS[1],
        PAIR=PAIR, PAGES=_PAGES_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _word_keys(position, SEED: tl.constexpr):
    key = position.to(tl.uint32) + tl.full(position.shape, SEED, tl.uint32)
    key = (key ^ (key >> 16)) * tl.full(position.shape, 0x85EBCA6B, tl.uint32)
    key = (key ^ (key >> 13)) * tl.full(position.shape, 0xC2B2AE35, tl.uint32)
    return key ^ (key >> 16)


@triton.jit
def _products(first, second, position, PAIR: tl.constexpr, SEED: tl.constexpr):
    a = (first + _word_keys(position, SEED)[None, :]).to(tl.uint64)
    b = (second + _word_keys(position + PAIR, SEED)[None, :]).to(tl.uint64)
    return a * b


@triton.jit
def _mix(value):
    value = (value ^ (value >> 30)) * tl.full(value.shape, 0xBF58476D1CE4E5B9, tl.uint64)
    value = (value ^ (value >> 27)) * tl.full(value.shape, 0x94D049BB133111EB, tl.uint64)
    return value ^ (value >> 31)


@triton.jit
def _finish(sums, region, layer, block, count, SEED: tl.constexpr):
    key = _mix(tl.full(sums.shape, SEED, tl.uint64) ^ region)
    key = _mix(_mix(_mix(key ^ layer) ^ block) ^ count)
    return _mix(key ^ sums)


@triton.jit(do_not_specialize=["num_pages"])
def _page_digest(
    words, offsets, token_bytes, region_numbers, layers, page_numbers, blocks, tokens, out, row_words, num_pages,
    SEED_0: tl.constexpr, SEED_1: tl.constexpr, MIX_0: tl.constexpr, MIX_1: tl.constexpr, PAIR: tl.constexpr,
    PAGES: tl.constexpr,
):  # fmt: skip
    """One region of PAGES pages."""
    nth = tl.program_id(0) * PAGES + tl.arange(0, PAGES)
    exists = nth < num_pages
    region = tl.program_id(1)
    size = tl.load(token_bytes + region) // 4
    page = tl.load(page_numbers + nth, mask=exists, other=0)
    count = tl.load(tokens + nth, mask=exists, other=0) * size
    # Regions begin at multiples of 16 bytes, which the compiler must know to load four words at once.
    at = words + page * row_words + tl.multiple_of(tl.load(offsets + region) // 4, 4)
    i = tl.arange(0, PAIR)
    sum_0 = tl.zeros([PAGES, PAIR], tl.uint64)
    sum_1 = tl.zeros([PAGES, PAIR], tl.uint64)
    # Chunks that every page of the program fills need no mask; in a long prompt that is all but the last page's.
    filled = tl.min(tl.where(exists, count, 1 << 30), axis=0).to(tl.int32) // (2 * PAIR) * (2 * PAIR)
    for begin in tl.range(0, filled, 2 * PAIR, num_stages=3):
        first = begin + i
        a = tl.load(at[:, None] + first[None, :], mask=exists[:, None], other=0).to(tl.uint32, bitcast=True)
        b = tl.load(at[:, None] + first[None, :] + PAIR, mask=exists[:, None], other=0).to(tl.uint32, bitcast=True)
        sum_0 += _products(a, b, first, PAIR, SEED_0)
        sum_1 += _products(a, b, first, PAIR, SEED_1)
    for begin in range(filled, tl.max(count, axis=0).to(tl.int32), 2 * PAIR):
        first = begin + i
        inside = first[None, :] < count[:, None]
        also = first[None, :] + PAIR < count[:, None]
        a = tl.load(at[:, None] + first[None, :], mask=inside, other=0).to(tl.uint32, bitcast=True)
        b = tl.load(at[:, None] + first[None, :] + PAIR, mask=also, other=0).to(tl.uint32, bitcast=True)
        begun = (begin < count)[:, None]  # chunks behind a page's last word are no part of it
        sum_0 += tl.where(begun, _products(a, b, first, PAIR, SEED_0), 0)
        sum_1 += tl.where(begun, _products(a, b, first, PAIR, SEED_1), 0)
    name = tl.load(region_numbers + region).to(tl.uint64)
    layer = tl.load(layers + region).to(tl.uint64)
    block = tl.load(blocks + nth, mask=exists, other=0).to(tl.uint64)
    length = count.to(tl.uint64)
    to = out + (region.to(tl.int64) * num_pages + nth) * 2
    tl.store(to, _finish(tl.sum(sum_0, axis=1), name, layer, block, length, MIX_0).to(tl.int64), mask=exists)
    tl.store(to + 1, _finish(tl.sum(sum_1, axis=1), name, layer, block, length, MIX_1).to(tl.int64), mask=exists)
