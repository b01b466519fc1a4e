"""A digest of what a page holds for a region, over its bytes in place: two 64-bit numbers that any device agrees on.

Words of 32 bits are summed as products of pairs, each word first shifted by a key that depends on where it stands (the
NH construction of Black and others, UMAC, 1999), twice with other keys. Each sum is then mixed with region, layer,
block and length, so that the same bytes elsewhere have another digest. It finds accidents, not forgers: the keys are
public.
"""

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from pdkv_kernels.paged import BLOCK

PAIR = 128
"""Word i of a chunk of 2 * PAIR words goes with word i + PAIR; the last chunk is filled up with zeros."""
WORD_SEEDS = (0x243F6A88, 0x85A308D3)
MIX_SEEDS = (0x13198A2E03707344, 0x243F6A8885A308D3)
_LOW = 0xFFFFFFFF
_WORDS_AT_ONCE = 1 << 16
"""So many stay in a processor's cache with all that is made of them."""


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

    rows: uint8 [arena pages, row bytes]; rows may lie further apart than they are long. Pages that hold equally many
    tokens are taken together, a few at a time.
    """
    words = rows.view(torch.int32)
    sums = torch.empty(regions.offset.numel(), pages.page.numel(), 2, dtype=torch.int64, device=rows.device)
    by_length = [(int(tokens), torch.nonzero(pages.num_tokens == tokens)[:, 0]) for tokens in pages.num_tokens.unique()]
    assert all(0 < tokens <= BLOCK for tokens, _ in by_length), f"pages hold {pages.num_tokens.tolist()} tokens"
    for i, (offset, token_bytes) in enumerate(zip(regions.offset.tolist(), regions.token_bytes.tolist(), strict=True)):
        assert offset % 16 == 0, f"region {i} begins at byte {offset} of a row"
        assert token_bytes % 4 == 0, f"a token of region {i} has {token_bytes} bytes"
        for num_tokens, places in by_length:
            count = num_tokens * token_bytes // 4
            for few in places.split(max(1, _WORDS_AT_ONCE // count)):
                sums[i, few] = _sums(words[pages.page[few], offset // 4 : offset // 4 + count])
    return _finish(sums, regions, pages)


def _sums(words: Tensor) -> Tensor:  # int64 [num_pages, 2]
    """The two sums of products modulo 2^64. words: int32 [num_pages, count]."""
    num_pages, count = words.shape
    chunks = -(-count // (2 * PAIR))
    wide = torch.nn.functional.pad(words, (0, chunks * 2 * PAIR - count))
    sums = []
    for seed in WORD_SEEDS:
        shifted = (wide + _word_keys(chunks, seed, words.device)).view(num_pages, chunks, 2, PAIR)  # modulo 2^32
        first, second = shifted.view(torch.uint32).long().unbind(2)
        sums.append((first * second).view(num_pages, -1).sum(dim=1))
    return torch.stack(sums, dim=1)


@lru_cache(maxsize=64)
def _word_keys(chunks: int, seed: int, device: torch.device) -> Tensor:  # int32 [chunks * 2 * PAIR]
    """The finaliser of MurmurHash3 (Appleby, public domain) on position + seed."""
    key = (torch.arange(chunks * 2 * PAIR, device=device) + seed) & _LOW
    key = ((key ^ (key >> 16)) * 0x85EBCA6B) & _LOW
    key = ((key ^ (key >> 13)) * 0xC2B2AE35) & _LOW
    key = key ^ (key >> 16)
    return torch.where(key > _LOW >> 1, key - (1 << 32), key).int()


def _finish(sums: Tensor, regions: DigestRegions, pages: DigestPages) -> Tensor:
    """Mix in what the words are of. sums: int64 [num_regions, num_pages, 2]."""
    counts = regions.token_bytes[:, None] // 4 * pages.num_tokens  # words: [num_regions, num_pages]
    lanes = []
    for lane, seed in enumerate(MIX_SEEDS):
        key = _mix(_mix(regions.region ^ _signed(seed)) ^ regions.layer)  # [num_regions]
        key = _mix(_mix(key[:, None] ^ pages.block) ^ counts)
        lanes.append(_mix(key ^ sums[:, :, lane]))
    return torch.stack(lanes, dim=2)


def _mix(value: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014). int64, its shifts those of unsigned numbers."""
    value = (value ^ _shifted(value, 30)) * _signed(0xBF58476D1CE4E5B9)
    value = (value ^ _shifted(value, 27)) * _signed(0x94D049BB133111EB)
    return value ^ _shifted(value, 31)


def _shifted(value: Tensor, bits: int) -> Tensor:
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
