"""What attention operations take: ragged queries with their page table, and paged K/V under any strides."""

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Tokens of a block, and of the page that holds it."""


@dataclass(frozen=True)
class RaggedQueries:
    """Query rows of several sequences, one sequence after another; a sequence may have no row at all.

    Row i of sequence s stands at position ``context_lens[s] + i`` and sees the keys up to that position, its own
    included. The sequence's keys end at its last row: whatever lies behind, NaN too, is never looked at.
    """

    query_starts: Tensor  # int32 [num_seqs + 1]
    context_lens: Tensor  # int32 [num_seqs], keys that precede the first row
    page_table: Tensor  # int32 [num_seqs, max_blocks], physical page of each block, padded with -1


@dataclass(frozen=True)
class PagedKv:
    """K and V of one layer. Any strides but 1 in the last dimension. Elements times scales, where there are scales."""

    k: Tensor  # [num_pages, num_kv_heads, BLOCK, head_dim]
    v: Tensor  # [num_pages, num_kv_heads, BLOCK, head_dim]
    k_scale: Tensor | None = None  # float32 [num_pages, num_kv_heads, BLOCK]
    v_scale: Tensor | None = None  # float32 [num_pages, num_kv_heads, BLOCK]


@dataclass(frozen=True)
class LayerPages:
    """Everywhere that new tokens of one layer leave something."""

    kv: PagedKv
    index_k: Tensor | None = None  # [num_pages, BLOCK, index_dim], on layers that select blocks themselves


def row_sequences(query_starts: Tensor) -> Tensor:
    """Which sequence each query row belongs to: int64 [num_rows]."""
    lengths = query_starts.diff().long()
    return torch.repeat_interleave(torch.arange(lengths.numel(), device=lengths.device), lengths)


def row_positions(queries: RaggedQueries) -> Tensor:
    """Position of each query row in its sequence: int64 [num_rows]."""
    seqs = row_sequences(queries.query_starts)
    rows = torch.arange(seqs.numel(), device=seqs.device)
    return rows - queries.query_starts.long()[seqs] + queries.context_lens.long()[seqs]


def sequence_rows(queries: RaggedQueries) -> list[tuple[int, int, int, int]]:
    """(sequence, first row, end row, position of the first row) of every sequence that has rows. Syncs."""
    starts = queries.query_starts.tolist()
    contexts = queries.context_lens.tolist()
    return [(s, starts[s], starts[s + 1], contexts[s]) for s in range(len(contexts)) if starts[s + 1] > starts[s]]
