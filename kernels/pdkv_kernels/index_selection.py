"""The choice of blocks in decode: one program for each row and head, behind the scan (``index_scan``).

Among groups of blocks, the best 16 blocks lie in those 16 groups whose best blocks are best: so a program ranks groups
first, and then the members of the winners. Of many blocks the scan has noted the best of each group; of few it reads
all keys, and makes groups of its own. On Hopper or later, most tables of so few go to ``index_choice`` instead, which
chooses the same without sorting.
"""

from enum import IntEnum

import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_choice import choice_fits, choose_by_counting
from pdkv_kernels.index_keys import wide_keys
from pdkv_kernels.index_scan import group_count, group_length
from pdkv_kernels.launch import FEW_PROGRAMS, chained, launch_options
from pdkv_kernels.paged import BLOCK

_NEVER = tl.constexpr(-0x80000000)
"""Below the key of every block."""
_NO_LEADER = tl.constexpr(-0x8000000000000000)

MOST_LEADERS_AT_ONCE = 2048
"""Groups that the selection ranks in one go; with more, it goes on from the best so far."""
GROUP = 8
"""Blocks of a group that the selection makes; rows of keys are multiples of it. 16 and 32 were slower on an H200
wherever it mattered."""


class Successor(IntEnum):
    """When the launch behind the selection may start, where launches overlap."""

    AT_ONCE = 0  # beside the scan in front
    IN_TURN = 1  # beside the selection
    BEHIND = 2  # when the selection has ended


def select_blocks(
    out: Tensor, keys: Tensor, leaders: Tensor, batch: DecodeBatch, splits: int, successor: Successor
) -> None:
    """Write each row's and head's best blocks to out, int32 [num_rows, heads, topk], by what ``scan_blocks`` wrote.

    splits: the scan's.
    """
    max_blocks = batch.page_table.shape[1]
    noted = group_length(max_blocks, splits)
    if noted == 1 and choice_fits(out, keys, max_blocks):
        choose_by_counting(out, keys, batch, int(successor))
    else:
        _select_by_sorting(out, keys, leaders, batch, splits, successor)


def _select_by_sorting(
    out: Tensor, keys: Tensor, leaders: Tensor, batch: DecodeBatch, splits: int, successor: Successor
) -> None:
    """``select_blocks`` for any number of places and blocks, on any device."""
    num_rows, heads, topk = out.shape
    early = chained()
    max_blocks = batch.page_table.shape[1]
    noted = group_length(max_blocks, splits)
    ranked = -(-max_blocks // GROUP) * GROUP if noted == 1 else group_count(max_blocks, splits)
    places = max(triton.next_power_of_2(topk), 2)
    at_once = max(triton.next_power_of_2(ranked), 64, places)
    if noted > 1:
        at_once = max(min(at_once, MOST_LEADERS_AT_ONCE), places)
    # To rank all at once saves reading twice; sorting more, where many programs do it, costs more than that.
    most = 256 if num_rows * heads < FEW_PROGRAMS else 128
    group = GROUP if noted == 1 and at_once > max(most, places * GROUP // 2) else 1
    _select_kernel[(num_rows, heads)](
        keys,
        leaders,
        out,
        batch.seq_lens,
        splits,
        batch.query_len,
        keys.stride(0),
        leaders.stride(0),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        HEADS=heads,
        TOKENS=BLOCK,
        TOPK=topk,
        PLACES=places,
        NOTED=noted,
        GROUPS=at_once // group,
        GROUP=group,
        WHOLE=ranked if at_once >= ranked else 0,
        SUCCESSOR=int(successor),
        EARLY=early,
        **launch_options(early, 1 if at_once <= 64 else 4, 1),
    )


@triton.jit(do_not_specialize=["splits", "query_len"])
def _select_kernel(
    keys_ptr,  # int32 [num_rows * heads, max_blocks or group_count * NOTED]
    leaders_ptr,  # int64 [num_rows * heads, group_count]
    out_ptr,  # int32 [num_rows, heads, TOPK]
    seq_lens_ptr,  # int32 [num_seqs]
    splits,
    query_len,
    keys_stride,
    leaders_stride,
    out_row_stride,
    out_head_stride,
    out_place_stride,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    PLACES: tl.constexpr,  # TOPK rounded up to a power of two
    NOTED: tl.constexpr,  # blocks of a group whose best the scan has noted; 1: of none
    GROUPS: tl.constexpr,  # ranked at once
    GROUP: tl.constexpr,  # blocks of each, where the scan has noted none
    WHOLE: tl.constexpr,  # leaders, or else keys, if all are to be read at once, whatever the length; else 0
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
    leaders_at = leaders_ptr + (row.to(tl.int64) * HEADS + head) * leaders_stride
    # What needs no length is asked for together with it.
    blocks = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    nth = tl.arange(0, GROUPS)
    if NOTED == 1:
        keys = tl.load(keys_at + blocks, mask=blocks < WHOLE, other=_NEVER)
    else:
        noted = tl.load(leaders_at + nth, mask=nth < WHOLE, other=_NO_LEADER)
    visible = tl.load(seq_lens_ptr + seq) - query_len + row % query_len + 1
    num_blocks = (tl.maximum(visible, 0) + TOKENS - 1) // TOKENS
    if NOTED == 1:
        found = wide_keys(tl.where(blocks < num_blocks, keys, _NEVER), blocks)
        best = tl.topk(tl.max(found, axis=1), PLACES)
        if GROUP > 1:
            best = _best_of_own_groups(keys_at, best, num_blocks, PLACES, GROUP)
    else:
        rounds = num_blocks // (NOTED * splits)
        num_leaders = rounds * splits + tl.minimum(num_blocks - rounds * NOTED * splits, splits)
        best = tl.topk(tl.where(nth < num_leaders, noted, _NO_LEADER), PLACES)
        if WHOLE == 0:
            for begin in tl.range(0, num_leaders, GROUPS):
                noted = tl.load(leaders_at + begin + nth, mask=begin + nth < num_leaders, other=_NO_LEADER)
                best = tl.topk(tl.reshape(tl.join(best, tl.topk(noted, PLACES)), (2 * PLACES,)), PLACES)
        best = _best_of_noted_groups(keys_at, best, num_blocks, splits, PLACES, NOTED)
    # A key holds the ordered score above and the complement of the block below.
    block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    place = tl.arange(0, PLACES)
    block = tl.where(place < num_blocks, block, -1)
    out_at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
    tl.store(out_at + place * out_place_stride, block, mask=place < TOPK)


@triton.jit
def _best_of_own_groups(keys_at, leaders, num_blocks, PLACES: tl.constexpr, GROUP: tl.constexpr):
    """The best PLACES keys of the groups of blocks side by side that these blocks lead: int64 [PLACES]."""
    first = (0x7FFFFFFF - (leaders & 0x7FFFFFFF).to(tl.int32)) // GROUP * GROUP
    blocks = first[:, None] + tl.arange(0, GROUP)[None, :]  # [PLACES, GROUP]
    # Groups are loaded whole, four keys at once, which a mask that may cut them anywhere would forbid.
    keys = tl.load(keys_at + blocks, mask=first[:, None] < num_blocks, other=_NEVER)
    candidates = wide_keys(tl.where(blocks < num_blocks, keys, _NEVER), blocks)
    return tl.topk(tl.reshape(candidates, (PLACES * GROUP,)), PLACES)


@triton.jit
def _best_of_noted_groups(keys_at, leaders, num_blocks, splits, PLACES: tl.constexpr, NOTED: tl.constexpr):
    """The best PLACES keys of the scan's groups that these blocks lead: int64 [PLACES]."""
    there = leaders != _NO_LEADER
    leader = tl.where(there, 0x7FFFFFFF - (leaders & 0x7FFFFFFF).to(tl.int32), 0)
    split, turn = leader % splits, leader // splits // NOTED  # the scan's program, and its turn among its groups
    member = tl.arange(0, NOTED)[None, :]
    blocks = (split + turn * NOTED * splits)[:, None] + member * splits  # [PLACES, NOTED]
    keys = tl.load(keys_at + ((turn * splits + split) * NOTED)[:, None] + member, mask=there[:, None], other=_NEVER)
    keys = tl.where(there[:, None] & (blocks < num_blocks), keys, _NEVER)
    return tl.topk(tl.reshape(wide_keys(keys, blocks), (PLACES * NOTED,)), PLACES)
