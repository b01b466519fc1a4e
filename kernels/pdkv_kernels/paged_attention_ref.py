"""Causal attention to all keys of a sequence, page by page with an online softmax."""

import torch
from torch import Tensor

from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries, sequence_rows

_TILE_ROWS = 512
_GROUP_BLOCKS = 8
_TILE_ELEMENTS = 1 << 20
"""Logits held at once over all heads; blocks are taken in groups of this many."""


def paged_attention_ref(q: Tensor, kv: PagedKv, queries: RaggedQueries, scale: float) -> tuple[Tensor, Tensor]:
    """Attend from q: [num_rows, num_heads, head_dim], whose heads are grouped by kv head, to all visible keys.

    Returns the output in q's dtype, [num_rows, num_heads, head_dim], and the natural log of the softmax's sum,
    float32 [num_rows, num_heads].
    """
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    for seq, start, end, context in sequence_rows(queries):
        for tile in range(start, end, _TILE_ROWS):
            rows = slice(tile, min(tile + _TILE_ROWS, end))
            first = context + tile - start
            _attend_tile(q[rows], kv, queries.page_table[seq], first, scale, out[rows], lse[rows])
    return out, lse


def _attend_tile(q: Tensor, kv: PagedKv, page_row: Tensor, first: int, scale: float, out: Tensor, lse: Tensor) -> None:
    """Consecutive rows of one sequence, the first at position ``first``; results go to out and lse in place."""
    num_rows, num_heads, dim = q.shape
    kv_heads = kv.k.shape[1]
    share = num_heads // kv_heads  # q heads that read one kv head
    num_keys = first + num_rows
    num_blocks = (num_keys - 1) // BLOCK + 1
    group = max(1, min(_GROUP_BLOCKS, _TILE_ELEMENTS // (num_rows * num_heads * BLOCK)))
    positions = torch.arange(first, num_keys, device=q.device).repeat(share)  # [share * num_rows]
    wide = (q.float() * scale).view(num_rows, kv_heads, share, dim).permute(1, 2, 0, 3)
    wide = wide.reshape(kv_heads, share * num_rows, dim)
    top = torch.full((kv_heads, share * num_rows, 1), -torch.inf, device=q.device)
    total = torch.zeros_like(top)
    sums = torch.zeros_like(wide)
    for begin in range(0, num_blocks, group):
        pages = page_row[begin : min(begin + group, num_blocks)].long()
        key_positions = torch.arange(begin * BLOCK, (begin + pages.numel()) * BLOCK, device=q.device)
        k = _load(kv.k, kv.k_scale, pages, num_keys - begin * BLOCK)
        logits = wide @ k.transpose(1, 2)  # [kv_heads, share * num_rows, keys]
        if (begin + pages.numel()) * BLOCK - 1 > first:
            logits.masked_fill_(key_positions > positions[:, None], -torch.inf)
        new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
        fade = (top - new_top).exp_()
        weights = logits.sub_(new_top).exp_()
        v = _load(kv.v, kv.v_scale, pages, num_keys - begin * BLOCK)
        sums.mul_(fade).baddbmm_(weights, v)
        total.mul_(fade).add_(weights.sum(dim=-1, keepdim=True))
        top = new_top
    out.copy_((sums / total).view(kv_heads, share, num_rows, dim).permute(2, 0, 1, 3).reshape(out.shape))
    lse.copy_((top + total.log()).view(kv_heads, share, num_rows).permute(2, 0, 1).reshape(lse.shape))


def _load(pages: Tensor, scales: Tensor | None, ids: Tensor, num_keys: int) -> Tensor:
    """Pages side by side, float32 [kv_heads, keys, head_dim]; rows past the sequence's end are 0, whatever is there."""
    rows = pages.transpose(0, 1)[:, ids].float()  # [kv_heads, pages, BLOCK, head_dim]
    if scales is not None:
        rows = rows * scales.transpose(0, 1)[:, ids][..., None]
    rows = rows.reshape(pages.shape[1], -1, pages.shape[3])
    if num_keys < rows.shape[1]:
        rows[:, num_keys:] = 0.0
    return rows
