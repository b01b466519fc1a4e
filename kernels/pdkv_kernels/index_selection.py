"""The choice of blocks in decode: one program for each row and head, behind the scan (``index_scan``).

Among groups of blocks, the best 16 blocks lie in those 16 groups whose best blocks are best: so a program ranks groups
first, and then the members of the winners.
"""

from enum import IntEnum

import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK

_NEVER = tl.constexpr(-0x80000000)
"""Below the key of every block."""

MOST_BLOCKS_AT_ONCE = 4096
"""Blocks that the selection ranks in one go; with more, it goes on from the best so far."""
GROUP = 8
"""Blocks of a group; rows of keys are multiples of it. 16 and 32 were slower on an H200 wherever it mattered."""


class Successor(IntEnum):
    """When the launch behind the selection may start, where launches overlap."""

    AT_ONCE = 0  # beside the scan in front
    IN_TURN = 1  # beside the selection
    BEHIND = 2  # when the selection has ended


def select_blocks(out: Tensor, keys: Tensor, batch: DecodeBatch, successor: Successor) -> None:
    """Write each row's and head's best blocks to out, int32 [num_rows, heads, topk], by the keys of ``scan_blocks``."""
    num_rows, heads, topk = out.shape
    early = chained()
    chunk = min(max(triton.next_power_of_2(keys.shape[1]), 64), MOST_BLOCKS_AT_ONCE)
    places = max(triton.next_power_of_2(topk), 2)
    chunk = max(chunk, places)
    group = GROUP if chunk >= max(256, places * GROUP) else 1
    _select_kernel[(num_rows, heads)](
        keys,
        out,
        batch.seq_lens,
        batch.query_len,
        keys.stride(0),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        HEADS=heads,
        TOKENS=BLOCK,
        TOPK=topk,
        PLACES=places,
        GROUPS=chunk // group,
        GROUP=group,
        WHOLE=keys.shape[1] if chunk >= keys.shape[1] else 0,
        SUCCESSOR=int(successor),
        EARLY=early,
        **launch_options(early, 1 if chunk <= 64 else 4 if chunk <= 2048 else 8, 1),
    )


@triton.jit(do_not_specialize=["query_len"])
def _select_kernel(
    keys_ptr,  # int32 [num_rows * heads, max_blocks]
    out_ptr,  # int32 [num_rows, heads, TOPK]
    seq_lens_ptr,  # int32 [num_seqs]
    query_len,
    keys_stride,
    out_row_stride,
    out_head_stride,
    out_place_stride,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    PLACES: tl.constexpr,  # TOPK rounded up to a power of two
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # columns of keys, if all are to be read at once, whatever the length; else 0
    SUCCESSOR: tl.constexpr,
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    seq = row // query_len
    if EARLY:
        if SUCCESSOR == 0:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
        if SUCCESSOR == 1:
            tl.extra.cuda.gdc_launch_dependents()
    keys_at = keys_ptr + (row.to(tl.int64) * HEADS + head) * keys_stride
    blocks = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scores = tl.load(keys_at + blocks, mask=blocks < WHOLE, other=_NEVER)
    visible = tl.load(seq_lens_ptr + seq) - query_len + row % query_len + 1
    num_blocks = (tl.maximum(visible, 0) + TOKENS - 1) // TOKENS
    if WHOLE > 0:
        found = _wide_keys_of(tl.where(blocks < num_blocks, scores, _NEVER), blocks)
        best = tl.topk(tl.max(found, axis=1), PLACES)
        if GROUP > 1:
            best = _best_of_groups(keys_at, best, 0, num_blocks, PLACES, GROUP)
    else:
        best = tl.full((PLACES,), -0x8000000000000000, tl.int64)
        for begin in tl.range(0, num_blocks, GROUPS * GROUP):
            found = _best_of_chunk(keys_at, begin, num_blocks, PLACES, GROUPS, GROUP)
            if begin == 0:
                best = found
            else:
                best = tl.topk(tl.reshape(tl.join(best, found), (2 * PLACES,)), PLACES)
    # A key holds the ordered score above and the complement of the block below.
    block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    place = tl.arange(0, PLACES)
    block = tl.where(place < num_blocks, block, -1)
    out_at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
    tl.store(out_at + place * out_place_stride, block, mask=place < TOPK)


@triton.jit
def _best_of_chunk(keys_at, begin, num_blocks, PLACES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The best PLACES keys of GROUPS * GROUP blocks from ``begin`` on, best first: int64 [PLACES]."""
    group = tl.arange(0, GROUPS)
    if GROUP == 1:
        return tl.topk(_wide_keys(keys_at, begin + group, num_blocks, 1), PLACES)
    member = tl.arange(0, GROUP)
    blocks = begin + group[:, None] * GROUP + member[None, :]
    keys = _wide_keys(keys_at, blocks, num_blocks, GROUP)  # [GROUPS, GROUP]
    leaders = tl.topk(tl.max(keys, axis=1), PLACES)  # best block of each of the best groups
    return _best_of_groups(keys_at, leaders, begin, num_blocks, PLACES, GROUP)


@triton.jit
def _best_of_groups(keys_at, leaders, begin, num_blocks, PLACES: tl.constexpr, GROUP: tl.constexpr):
    """The best PLACES keys of the groups that these blocks lead: int64 [PLACES]."""
    winners = (0x7FFFFFFF - (leaders & 0x7FFFFFFF).to(tl.int32) - begin) // GROUP
    blocks = begin + winners[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    candidates = _wide_keys(keys_at, blocks, num_blocks, GROUP)  # [PLACES, GROUP]
    return tl.topk(tl.reshape(candidates, (PLACES * GROUP,)), PLACES)


@triton.jit
def _wide_keys(keys_at, blocks, num_blocks, GROUP: tl.constexpr):
    """Keys that all differ: the ordered score above, and below it the complement of the block, so that low ids win."""
    # Groups are loaded whole, four keys at once, which a mask that may cut them anywhere would forbid.
    scores = tl.load(keys_at + blocks, mask=blocks // GROUP * GROUP < num_blocks, other=_NEVER)
    return _wide_keys_of(tl.where(blocks < num_blocks, scores, _NEVER), blocks)


@triton.jit
def _wide_keys_of(scores, blocks):
    return (scores.to(tl.int64) << 32) | (0x7FFFFFFF - blocks).to(tl.int64)
