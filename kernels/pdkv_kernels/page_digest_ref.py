"""A digest of what a page holds for a region, over its bytes in place: two 64-bit numbers that any device agrees on.

Words of 32 bits are summed as products of pairs, each word first shifted by a key that depends on where it stands (the
NH construction of Black and others, UMAC, 1999), twice with other keys. Each sum is then mixed with region, layer,
block and length, so that the same bytes elsewhere have another digest. It finds accidents, not forgers: the keys are
public.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv_kernels.paged import BLOCK

PAIR = 128
"""Word i of a chunk of 2 * PAIR words goes with word i + PAIR; the last chunk is filled up with zeros."""
WORD_SEEDS = (0x243F6A88, 0x85A308D3)
MIX_SEEDS = (0x13198A2E03707344, 0x243F6A8885A308D3)
_LOW = 0xFFFFFFFF


@dataclass(frozen=True)
class DigestRegions:
    """Where regions lie in a row, one element a region: int64 [num_regions] each."""

    offset: Tensor  # bytes from the row's start, a multiple of 16
    token_bytes: Tensor  # bytes of one token, a multiple of 4; a region is BLOCK of them, one after another
    region: Tensor  # number of the kind of payload and kv head, any that both sides agree on
    layer: Tensor  # global layer


@dataclass(frozen=True)
class DigestPages:
    """Which pages, and which blocks of a sequence they hold: int64 [num_pages] each."""

    page: Tensor  # row of the arena
    block: Tensor  # logical block number
    num_tokens: Tensor  # valid tokens, 1 to BLOCK; whatever lies behind them is not looked at


def page_digest_ref(rows: Tensor, regions: DigestRegions, pages: DigestPages) -> Tensor:
    """128 bits for each region of each page: int64 [num_regions, num_pages, 2].

    rows: uint8 [arena pages, row bytes]; rows may lie further apart than they are long.
    """
    words = rows.view(torch.int32)
    out = torch.empty(regions.offset.numel(), pages.page.numel(), 2, dtype=torch.int64, device=rows.device)
    for i, (offset, token_bytes) in enumerate(zip(regions.offset.tolist(), regions.token_bytes.tolist(), strict=True)):
        assert offset % 16 == 0, f"region {i} begins at byte {offset} of a row"
        assert token_bytes % 4 == 0, f"a token of region {i} has {token_bytes} bytes"
        for j, (page, num_tokens) in enumerate(zip(pages.page.tolist(), pages.num_tokens.tolist(), strict=True)):
            assert 0 < num_tokens <= BLOCK, f"page {page} holds {num_tokens} tokens"
            count = num_tokens * token_bytes // 4
            sums = _sums(words[page, offset // 4 : offset // 4 + count])
            for lane in range(2):
                key = MIX_SEEDS[lane]
                for value in (int(regions.region[i]), int(regions.layer[i]), int(pages.block[j]), count):
                    key = _mix(key ^ value)
                out[i, j, lane] = _signed(_mix(key ^ sums[lane]))
    return out


def _sums(words: Tensor) -> list[int]:
    """The two sums of products modulo 2^64. words: int32 [count]."""
    chunks = -(-words.numel() // (2 * PAIR))
    wide = words.new_zeros(chunks * 2 * PAIR, dtype=torch.int64)
    wide[: words.numel()] = words.long() & _LOW
    position = torch.arange(wide.numel(), device=words.device)
    sums = []
    for seed in WORD_SEEDS:
        shifted = (wide + _word_keys(position, seed)) & _LOW
        first, second = shifted.view(chunks, 2, PAIR).unbind(1)
        sums.append(int((first * second).sum()) & 0xFFFFFFFFFFFFFFFF)
    return sums


def _word_keys(position: Tensor, seed: int) -> Tensor:
    """The finaliser of MurmurHash3 (Appleby, public domain) on position + seed: int64, below 2^32."""
    key = (position + seed) & _LOW
    key = ((key ^ (key >> 16)) * 0x85EBCA6B) & _LOW
    key = ((key ^ (key >> 13)) * 0xC2B2AE35) & _LOW
    return key ^ (key >> 16)


def _mix(value: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
