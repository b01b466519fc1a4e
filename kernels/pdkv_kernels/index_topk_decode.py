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
from pdkv_kernels.index_scan import ScanPlan, scan_blocks
from pdkv_kernels.index_selection import GROUP, select_blocks
from pdkv_kernels.paged import BLOCK, RaggedQueries

_MULTIPROCESSORS = 132
"""Of an H200. With another number of them the scan is right too, and further from the best."""


@dataclass(frozen=True)
class SelectionRule:
    """How many blocks are chosen, and which are chosen whatever they score; those use up places."""

    topk: int
    init_blocks: int
    local_blocks: int


class IndexWorkspace:
    """Scores between the two launches, for batches of up to this many rows, heads and blocks.

    One workspace serves all layers, one after another on one stream. It never needs clearing.
    """

    def __init__(self, num_rows: int, num_heads: int, max_blocks: int, device: torch.device | str) -> None:
        self.keys = torch.empty(num_rows * num_heads, -(-max_blocks // 16) * 16, dtype=torch.int32, device=device)


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
    keys = workspace.keys
    assert keys.shape[0] >= num_rows * heads, (keys.shape, index_q.shape)
    assert keys.shape[1] >= batch.page_table.shape[1], (keys.shape, batch.page_table.shape)
    assert keys.shape[1] % GROUP == 0, keys.shape
    if num_rows == 0:
        return
    plan = plan or scan_plan(batch, index_q, index_k)
    scan_blocks(keys, index_q, index_k, batch, (rule.init_blocks, rule.local_blocks), plan)
    select_blocks(out, keys, batch, scan_follows=scan_follows)


def scan_plan(batch: DecodeBatch, index_q: Tensor, index_k: Tensor) -> ScanPlan:
    """By shapes alone, measured on an H200."""
    is_small = index_k.element_size() == 1
    # Eight columns are enough for Hopper's larger matrix instructions, which hold one more tile.
    is_wide = triton.next_power_of_2(index_q.shape[1]) * triton.next_power_of_2(batch.query_len) >= 8
    if not batch.settled and not is_wide:
        return _unsettled_plan(batch.num_seqs, index_k.element_size())
    # Programs fill the multiprocessors exactly, and their tiles the memory that threads share: where the next scan's
    # programs found room beside this one's, some multiprocessors would hold more of them than others, and be the last.
    if is_small:
        programs, stages = 4, 3 if is_wide else 4
    elif is_wide:
        programs, stages = 2, 3
    else:
        programs, stages = (3, 3) if batch.num_seqs <= 16 else (2, 4)
    splits = max(1, programs * _MULTIPROCESSORS // batch.num_seqs)
    return ScanPlan(splits - splits % 4 if splits > 8 else splits, 4, stages)


def _unsettled_plan(num_seqs: int, key_bytes: int) -> ScanPlan:
    """For this many sequences and bytes of a key's element.

    About four programs on each multiprocessor were best. One sequence is short work: its programs fill the
    multiprocessors exactly, each with three tiles in flight. Many short sequences fill them with eight, if registers
    let them; short tiles gain most by pages that are known beforehand, long ones by being asked for in one piece.
    """
    if num_seqs == 1:
        return ScanPlan(528 if key_bytes == 1 else 264, 4, 4, ahead=16, early_tiles=1, requests=False)
    if num_seqs > 128 and key_bytes == 1:
        return ScanPlan(max(2, 1024 // num_seqs), 4, 3, ahead=0, early_tiles=1, requests=False, registers=64)
    splits = 1 << (max(2, 512 // num_seqs).bit_length() - 1)
    if key_bytes == 1:
        return ScanPlan(splits, 4, 3, ahead=16, early_tiles=1, requests=False)
    return ScanPlan(splits, 4, 3, ahead=0, requests=key_bytes == 2)
