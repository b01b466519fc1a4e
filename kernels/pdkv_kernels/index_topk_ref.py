"""The lightning indexer: score every visible block with one key per token, and keep the best few for each query."""

import torch
from torch import Tensor

from pdkv_kernels.paged import BLOCK, RaggedQueries, sequence_rows

_GROUP_ELEMENTS = 1 << 20
"""Scores held at once; blocks are taken in groups of this many so that a group stays in a core's cache."""

_INVISIBLE = torch.iinfo(torch.int64).min


def index_topk_ref(
    index_q: Tensor, index_k: Tensor, queries: RaggedQueries, topk: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """Blocks that each query row and head attends to: int32 [num_rows, heads, topk], logical ids, -1 behind the last.

    index_q: [num_rows, heads, dim]; index_k: [num_pages, BLOCK, dim], one key a token for all heads. The score of a
    block is the largest dot product with its visible keys (NaN if one of them is NaN); ``select_blocks_ref`` orders.
    """
    num_rows, heads, _ = index_q.shape
    out = torch.full((num_rows, heads, topk), -1, dtype=torch.int32, device=index_q.device)
    for seq, start, end, context in sequence_rows(queries):
        positions = torch.arange(context, context + end - start, device=index_q.device)
        num_blocks = (context + end - start - 1) // BLOCK + 1
        pages = queries.page_table[seq, :num_blocks].long()
        scores = block_scores_ref(index_q[start:end], index_k, pages, positions)
        visible = (positions // BLOCK + 1)[:, None].expand(-1, heads)
        out[start:end] = select_blocks_ref(scores, visible, topk, init_blocks, local_blocks)
    return out


def block_scores_ref(index_q: Tensor, index_k: Tensor, pages: Tensor, positions: Tensor) -> Tensor:
    """Best dot product of each query with the visible keys of each block: float32 [num_rows, heads, num_blocks].

    One sequence: index_q [num_rows, heads, dim], pages int64 [num_blocks], positions int64 [num_rows], ascending.
    Blocks without a visible key score -inf.
    """
    num_rows, heads, dim = index_q.shape
    flat = index_q.float().reshape(num_rows * heads, dim)
    scores = torch.empty(num_rows * heads, pages.numel(), device=index_q.device)
    group = max(1, _GROUP_ELEMENTS // (num_rows * heads * BLOCK))
    first_position = int(positions[0])
    for begin in range(0, pages.numel(), group):
        ids = pages[begin : begin + group]
        keys = index_k[ids].float().reshape(-1, dim)  # [blocks * BLOCK, dim]
        dots = flat @ keys.T  # [num_rows * heads, blocks * BLOCK]
        if (begin + ids.numel()) * BLOCK - 1 > first_position:
            key_positions = torch.arange(begin * BLOCK, begin * BLOCK + keys.shape[0], device=index_q.device)
            hidden = key_positions > positions[:, None]  # [num_rows, blocks * BLOCK]
            dots.view(num_rows, heads, -1).masked_fill_(hidden[:, None, :], -torch.inf)
        torch.amax(dots.view(num_rows * heads, -1, BLOCK), dim=-1, out=scores[:, begin : begin + ids.numel()])
    return scores.view(num_rows, heads, -1)


def select_blocks_ref(scores: Tensor, visible: Tensor, topk: int, init_blocks: int, local_blocks: int) -> Tensor:
    """The first ``topk`` visible blocks in one total order: int32 [..., topk], left-packed, -1 where there are none.

    scores: float32 [..., num_blocks]; visible: int64 [...], how many leading blocks the query sees. Order: the first
    ``init_blocks``, the last ``local_blocks`` visible ones, then by score, high to low, NaN lowest (below -inf, yet
    above nothing); equals go by lower block id. So forced blocks use up places among the ``topk``.
    """
    num_blocks = scores.shape[-1]
    block = torch.arange(num_blocks, device=scores.device)
    last = visible[..., None]
    rank = _ordered_bits(scores)
    rank = torch.where(block >= last - local_blocks, 1 << 32, rank)
    rank = torch.where(block < init_blocks, 1 << 33, rank)
    # Rank above, complement of the id below: all keys differ, so the order is total and topk cannot break ties its way.
    key = (rank << 24) + (num_blocks - 1 - block)
    key = key.masked_fill(block >= last, _INVISIBLE)
    best = key.topk(min(topk, num_blocks), dim=-1)
    chosen = best.indices.masked_fill(best.values == _INVISIBLE, -1).int()
    return torch.nn.functional.pad(chosen, (0, topk - chosen.shape[-1]), value=-1)


def _ordered_bits(scores: Tensor) -> Tensor:
    """int64 that compares as the floats do, with -0 equal to +0 and NaN below all else; magnitude below 2^32."""
    bits = (scores + 0.0).view(torch.int32).long()  # adding +0 turns -0 into +0
    ordered = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return torch.where(scores.isnan(), -(1 << 32), ordered)
