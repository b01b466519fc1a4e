"""The lightning indexer in decode: a scan of all index keys at the memory's speed, then a small selection.

Two launches (``index_scan``, ``index_selection``). Where launches may overlap, a selection waits in its place beside
the scan in front of it. Where calls follow one another, programs of the next scan take the places of those that end,
with their first tiles if they may read these (``DecodeBatch.settled``).
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from pdkv_kernels.decode_batch import DecodeBatch, uniform_batch
from pdkv_kernels.index_ring import RingPlan, ring_fits
from pdkv_kernels.index_scan import MOST_WITHOUT_GROUPS, ScanPlan, group_count, group_length, scan_blocks
from pdkv_kernels.index_selection import GROUP, Successor, select_blocks
from pdkv_kernels.launch import FEW_PROGRAMS
from pdkv_kernels.paged import BLOCK, RaggedQueries

_MULTIPROCESSORS = 132
"""Of an H200. With another number of them the scan is right too, and further from the best."""


_FEWEST_FOR_WARPS = 7
"""Blocks for each multiprocessor from which on it has work for sixteen warps that share nothing."""


@dataclass(frozen=True)
class SelectionRule:
    """How many blocks are chosen, and which are chosen whatever they score; those use up places."""

    topk: int
    init_blocks: int
    local_blocks: int


class IndexWorkspace:
    """What the scan leaves to the selection, for batches of up to this many rows and heads, and so many blocks.

    One workspace serves all layers, one after another on one stream. It never needs clearing.
    """

    def __init__(self, num_rows: int, num_heads: int, max_blocks: int, device: torch.device | str) -> None:
        has_groups = max_blocks > MOST_WITHOUT_GROUPS
        width = -(-max_blocks * (2 if has_groups else 1) // 16) * 16
        self.keys = torch.empty(num_rows * num_heads, width, dtype=torch.int32, device=device)
        leaders = max_blocks if has_groups else 0
        self.leaders = torch.empty(num_rows * num_heads, leaders, dtype=torch.int64, device=device)


def index_topk_decode(
    index_q: Tensor, index_k: Tensor, queries: RaggedQueries, topk: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """``index_topk_ref`` for sequences that all have equally many query rows; allocates what it needs."""
    batch = uniform_batch(queries, index_q.shape[0])
    rule = SelectionRule(topk, init_blocks, local_blocks)
    out = torch.empty(*index_q.shape[:2], topk, dtype=torch.int32, device=index_q.device)
    workspace = IndexWorkspace(index_q.shape[0], index_q.shape[1], batch.page_table.shape[1], index_q.device)
    index_topk_decode_into(out, index_q, index_k, batch, rule, workspace)
    return out


def index_topk_decode_into(
    out: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    batch: DecodeBatch,
    rule: SelectionRule,
    workspace: IndexWorkspace,
    plan: ScanPlan | None = None,
    *,
    scan_follows: bool = False,
) -> None:
    """Write the blocks of every row and head to out: int32 [num_rows, heads, topk], any strides.

    index_q: [num_rows, heads, dim]; index_k: [num_pages, BLOCK, dim], any strides but 1 in the last dimension, in the
    same dtype or in another float. Equal fp8 dtypes are multiplied as they are. Neither allocates nor waits, and
    launches by shapes alone; a plan measured for M3 is used where none is given. scan_follows: the next launch is
    another call's; it may start as soon as there is room, which attention had better not.
    """
    num_rows, heads, dim = index_q.shape
    assert num_rows == batch.num_seqs * batch.query_len, (index_q.shape, batch.num_seqs, batch.query_len)
    assert index_k.shape[1:] == (BLOCK, dim), index_k.shape
    assert index_k.stride(2) == 1, index_k.stride()
    assert index_q.stride(2) == 1, index_q.stride()
    assert batch.page_table.stride(1) == 1, batch.page_table.stride()
    assert out.shape == (num_rows, heads, rule.topk), out.shape
    if num_rows == 0:
        return
    plan = plan or scan_plan(batch, index_q, index_k, scan_follows=scan_follows)
    keys, leaders = workspace.keys, workspace.leaders
    _check_room(keys, leaders, num_rows * heads, batch.page_table.shape[1], plan.splits)
    scan_blocks(keys, leaders, index_q, index_k, batch, (rule.init_blocks, rule.local_blocks), plan)
    attention = _attention_starts(num_rows * heads, index_k.element_size())
    select_blocks(out, keys, leaders, batch, plan.splits, Successor.AT_ONCE if scan_follows else attention)


def _check_room(keys: Tensor, leaders: Tensor, columns: int, max_blocks: int, splits: int) -> None:
    """AssertionError where a workspace is too small."""
    assert keys.shape[0] >= columns, (keys.shape, columns)
    assert keys.shape[1] >= max_blocks, (keys.shape, max_blocks)
    assert keys.shape[1] % GROUP == 0, keys.shape
    length = group_length(max_blocks, splits)
    if length > 1:
        groups = group_count(max_blocks, splits)
        assert keys.shape[1] >= groups * length, (keys.shape, groups, length)
        assert leaders.shape[1] >= groups, (leaders.shape, groups)


def scan_plan(batch: DecodeBatch, index_q: Tensor, index_k: Tensor, *, scan_follows: bool = False) -> ScanPlan:
    """By shapes alone, measured on an H200, in rows and in layers: behind an ordinary kernel and the store, in front of
    attention.

    Programs fill the multiprocessors exactly, and their tiles the memory that threads share: where as many more of them
    find room, those that start early crowd on some multiprocessors, which are then the last.
    """
    rows, heads, _ = index_q.shape
    ring = _ring_plan(batch, index_k, rows * heads, scan_follows) if ring_fits(index_q, index_k, batch) else None
    if ring:
        most = -(-batch.page_table.shape[1] // _splits(ring.programs, batch, 1))  # blocks of a program
        return ScanPlan(-(-batch.page_table.shape[1] // most), 4, 4, ring=ring)
    # Eight columns are enough for Hopper's larger matrix instructions, which hold one more tile.
    is_wide = triton.next_power_of_2(heads) * triton.next_power_of_2(batch.query_len) >= 8
    has_groups = batch.page_table.shape[1] > MOST_WITHOUT_GROUPS
    if index_k.element_size() > 1:
        programs, stages = (2, 3) if is_wide else (3, 3) if batch.num_seqs <= 16 and not has_groups else (2, 4)
    elif is_wide or scan_follows or rows * heads <= FEW_PROGRAMS:
        programs, stages = 4, 3 if is_wide else 4
    else:  # behind a store whose successor does not start early
        return ScanPlan(_splits(3, batch, 2), 4, 3, in_advance=False)
    return ScanPlan(_splits(programs, batch, 1), 4, stages)


def _ring_plan(batch: DecodeBatch, index_k: Tensor, columns: int, scan_follows: bool) -> RingPlan | None:
    """None where Triton's scan is faster. columns: rows times heads, which are the selection's programs."""
    max_blocks = batch.page_table.shape[1]
    one_byte = index_k.element_size() == 1
    blocks = batch.num_seqs * max_blocks // _MULTIPROCESSORS  # of a multiprocessor
    whole = RingPlan(BLOCK, 3, 4, 4 if one_byte else 2)
    has_groups = max_blocks > MOST_WITHOUT_GROUPS
    if one_byte and not has_groups and _FEWEST_FOR_WARPS <= blocks <= 8 * 16:
        behind = 0
        if not scan_follows or columns <= FEW_PROGRAMS:  # what follows comes beside a program's last blocks
            behind = 2 if scan_follows and blocks > 2 * 16 else 1
        return RingPlan(32, 3, 1, 16, behind)
    if one_byte and blocks < _FEWEST_FOR_WARPS:
        return whole
    if scan_follows and not one_byte and not has_groups and 30 <= blocks <= 16 * 4:
        return RingPlan(64, 3, 2, 4)
    if one_byte and not scan_follows and columns > FEW_PROGRAMS:
        return None
    # A ring that is filled once only costs more than it gains.
    return whole if max_blocks > whole.slots * _splits(whole.programs, batch, 1) else None


def _splits(programs: int, batch: DecodeBatch, fewest: int) -> int:
    """Programs that share a sequence, so many on each multiprocessor."""
    # Of 512 groups the best are found in half the time that 528 take, which are ranked as 1,024.
    multiprocessors = 128 if batch.page_table.shape[1] > MOST_WITHOUT_GROUPS else _MULTIPROCESSORS
    splits = max(fewest, programs * multiprocessors // batch.num_seqs)
    return splits - splits % 4 if splits > 8 else splits


def _attention_starts(programs: int, key_bytes: int) -> Successor:
    """By the selection's programs. Over bytes, attention's own are small: many fit into a multiprocessor, and crowd
    where the selection has left room, unless it is too small to matter or so large that it leaves none."""
    crowds = key_bytes == 1 and FEW_PROGRAMS < programs <= 2 * _MULTIPROCESSORS
    return Successor.BEHIND if crowds else Successor.IN_TURN
