"""Ragged prefill batches over strided, shuffled, poisoned pages in any dtype and on any device."""

from dataclasses import dataclass

import torch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries, row_positions
from torch import Tensor

from tests.kernels.decode_case import FP8, cpu, make_decode


@dataclass(frozen=True)
class PrefillCase:
    queries: RaggedQueries
    kv: PagedKv
    index_k: Tensor  # [num_pages, BLOCK, dim]
    q: Tensor  # [num_rows, num_heads, dim]
    index_q: Tensor  # [num_rows, kv_heads, dim]

    def reference(self) -> tuple[RaggedQueries, PagedKv]:
        """The same queries and pages for a reference on the CPU."""
        queries = self.queries
        on_cpu = (queries.query_starts.cpu(), queries.context_lens.cpu(), queries.page_table.cpu())
        return RaggedQueries(*on_cpu), cpu(self.kv)


def make_prefill(
    device: str,
    dtype: torch.dtype,
    lengths: list[tuple[int, int]],
    *,
    heads: tuple[int, int] = (8, 4),
    dim: int = 16,
    scaled: bool = True,
    seed: int = 0,
) -> PrefillCase:
    """Sequences of (context, query) tokens; pages as ``make_decode`` poisons them. ``scaled`` concerns fp8 alone."""
    made = make_decode(device, dtype, [context + query for context, query in lengths], heads=heads, dim=dim, seed=seed)
    starts = torch.tensor([0] + [query for _, query in lengths]).cumsum(0).int()
    contexts = torch.tensor([context for context, _ in lengths], dtype=torch.int32)
    generator = torch.Generator().manual_seed(seed + 1)
    num_rows = int(starts[-1])
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    q = (torch.randn(num_rows, heads[0], dim, generator=generator) * 2.0).to(kind)
    index_q = torch.randn(num_rows, heads[1], dim, generator=generator).to(dtype if dtype in FP8 else kind)
    kv = made.kv if scaled else PagedKv(made.kv.k, made.kv.v)
    queries = RaggedQueries(starts.to(device), contexts.to(device), made.batch.page_table)
    return PrefillCase(queries, kv, made.index_k, q.to(device), index_q.to(device))


def choices(queries: RaggedQueries, kv_heads: int, topk: int, window: int = 1, own: int = 0) -> Tensor:
    """Random visible blocks of each row and head, its newest among them: int32 [num_rows, kv_heads, topk], CPU.

    Rows of a window choose alike, but for ``own`` places that each fills by itself.
    """
    generator = torch.Generator().manual_seed(17)
    on_cpu = RaggedQueries(queries.query_starts.cpu(), queries.context_lens.cpu(), queries.page_table.cpu())
    positions = row_positions(on_cpu).tolist()
    out = torch.full((len(positions), kv_heads, topk), -1, dtype=torch.int32)
    for row, position in enumerate(positions):
        newest = position // BLOCK
        for head in range(kv_heads):
            alike = torch.Generator().manual_seed(row // window * kv_heads + head)
            shared = torch.randperm(newest, generator=alike)[: topk - 1 - own]
            others = torch.randperm(newest, generator=generator)
            others = others[~torch.isin(others, shared)][:own]
            chosen = torch.cat((torch.tensor([newest]), shared, others)).int()
            out[row, head, : chosen.numel()] = chosen
    return out
