"""Ragged batches over strided, shuffled, poisoned pages, and plain float64 formulas to compare operations with."""

from dataclasses import dataclass

import torch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from torch import Tensor


@dataclass(frozen=True)
class PagedCase:
    queries: RaggedQueries
    kv: PagedKv
    index_k: Tensor  # [num_pages, BLOCK, dim]
    q: Tensor  # [num_rows, num_heads, dim]
    index_q: Tensor  # [num_rows, kv_heads, dim]
    k: list[Tensor]  # for each sequence, what its pages hold: [kv_heads, num_keys, dim]
    v: list[Tensor]
    keys: list[Tensor]  # index keys of each sequence: [num_keys, dim]

    def rows(self) -> list[tuple[int, int, int]]:
        """(row, sequence, position) of every query row, counted out one by one."""
        starts, contexts = self.queries.query_starts.tolist(), self.queries.context_lens.tolist()
        return [
            (row, seq, contexts[seq] + row - starts[seq])
            for seq in range(len(contexts))
            for row in range(starts[seq], starts[seq + 1])
        ]


def make_case(
    lengths: list[tuple[int, int]],
    *,
    seed: int = 0,
    num_heads: int = 8,
    kv_heads: int = 4,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
) -> PagedCase:
    """Sequences of (context, query) tokens. All memory but the sequences' own keys is NaN, and pages lie in disorder.

    Views are cut out of rows as an arena's are: index keys first, then head by head K and V, with a gap at the end.
    """
    generator = torch.Generator().manual_seed(seed)
    blocks = [-(-(context + query) // BLOCK) for context, query in lengths]
    num_pages = sum(blocks) + 3
    element = BLOCK * dim
    pitch = element * (1 + 2 * kv_heads) + 64
    memory = torch.full((num_pages * pitch,), torch.nan, dtype=dtype)
    strides = (pitch, 2 * element, dim, 1)
    k_pages = memory.as_strided((num_pages, kv_heads, BLOCK, dim), strides, element)
    v_pages = memory.as_strided((num_pages, kv_heads, BLOCK, dim), strides, 2 * element)
    index_pages = memory.as_strided((num_pages, BLOCK, dim), (pitch, dim, 1), 0)
    order = torch.randperm(num_pages, generator=generator)
    table = torch.full((len(lengths), max(blocks) + 1), -1, dtype=torch.int32)
    k, v, keys = [], [], []
    taken = 0
    for seq, (context, query) in enumerate(lengths):
        num_keys = context + query
        pages = order[taken : taken + blocks[seq]]
        taken += blocks[seq]
        table[seq, : blocks[seq]] = pages.int()
        k.append(torch.randn(kv_heads, num_keys, dim, generator=generator).to(dtype))
        v.append(torch.randn(kv_heads, num_keys, dim, generator=generator).to(dtype))
        keys.append(torch.randn(num_keys, dim, generator=generator).to(dtype))
        for position in range(num_keys):
            page, offset = int(pages[position // BLOCK]), position % BLOCK
            k_pages[page, :, offset] = k[-1][:, position]
            v_pages[page, :, offset] = v[-1][:, position]
            index_pages[page, offset] = keys[-1][position]
    starts = torch.tensor([0] + [query for _, query in lengths]).cumsum(0).int()
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    num_rows = int(starts[-1])
    q = torch.randn(num_rows, num_heads, dim, generator=generator) * 2.0
    index_q = torch.randn(num_rows, kv_heads, dim, generator=generator)
    queries = RaggedQueries(starts, contexts, table)
    return PagedCase(queries, PagedKv(k_pages, v_pages), index_pages, q, index_q, k, v, keys)


MIXED = [(700, 3), (0, 1), (130, 300), (127, 1), (500, 0), (128, 1), (0, 129), (255, 4)]
"""Decode rows, a prefix-less prompt, chunks that start inside a block, several query tokens, and nothing at all."""


def plain_scores(case: PagedCase, row: int, seq: int, position: int) -> Tensor:
    """Block scores of one row, one block after another: float64 [kv_heads, num_visible_blocks]."""
    dots = case.index_q[row].double() @ case.keys[seq][: position + 1].double().T  # [kv_heads, keys]
    return torch.stack([part.amax(dim=-1) for part in dots.split(BLOCK, dim=-1)], dim=-1)


def plain_attention(case: PagedCase, row: int, seq: int, position: int, visible: Tensor, scale: float):
    """One row over the keys that ``visible`` [kv_heads, position + 1] marks: output [heads, dim], log-sum [heads]."""
    share = case.q.shape[1] // case.kv.k.shape[1]
    k = case.k[seq][:, : position + 1].double().repeat_interleave(share, dim=0)
    v = case.v[seq][:, : position + 1].double().repeat_interleave(share, dim=0)
    logits = torch.einsum("hd,hkd->hk", case.q[row].double(), k) * scale
    logits = logits.masked_fill(~visible.repeat_interleave(share, dim=0), -torch.inf)
    return torch.einsum("hk,hkd->hd", logits.softmax(dim=-1), v), logits.logsumexp(dim=-1)
