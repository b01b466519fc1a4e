"""Causal attention of many query rows to all keys of a sequence, by torch's fused attention over pages put together.

Torch's kernels do not follow page tables: K and V of one sequence are gathered, once a call, in q's dtype.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries, sequence_rows


def paged_attention_gathered(q: Tensor, kv: PagedKv, queries: RaggedQueries, scale: float) -> Tensor:
    """``paged_attention_ref`` without the log of the softmax's sum: [num_rows, num_heads, head_dim] in q's dtype.

    Elements and their scales are multiplied in float32 and rounded to q's dtype. Syncs, to learn the lengths.
    """
    out = torch.empty_like(q)
    for seq, start, end, context in sequence_rows(queries):
        num_keys = context + end - start
        pages = queries.page_table[seq, : (num_keys - 1) // BLOCK + 1].long()
        k = _gather(kv.k, kv.k_scale, pages, num_keys, q.dtype)
        v = _gather(kv.v, kv.v_scale, pages, num_keys, q.dtype)
        mine = q[start:end].transpose(0, 1)[None]  # [1, num_heads, rows, head_dim]
        mask = causal_lower_right(end - start, num_keys)
        found = functional.scaled_dot_product_attention(
            mine, k[None], v[None], attn_mask=mask, scale=scale, enable_gqa=True
        )
        out[start:end] = found[0].transpose(0, 1)
    return out


def _gather(
    pages: Tensor, scales: Tensor | None, ids: Tensor, num_keys: int, dtype: torch.dtype
) -> Tensor:  # [kv_heads, num_keys, head_dim]
    """Keys of these pages in their order; whatever lies behind the last is left out."""
    rows = pages[ids]  # [num_blocks, kv_heads, BLOCK, head_dim]
    if scales is not None:
        rows = rows.float() * scales[ids][..., None]
    return rows.to(dtype).transpose(0, 1).flatten(1, 2)[:, :num_keys]
