"""One layer's attention: store what the new tokens leave behind, then let them attend to it."""

from dataclasses import dataclass
from typing import Protocol

from pdkv_kernels.index_topk_ref import index_topk_ref
from pdkv_kernels.kv_store_ref import kv_store_ref
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries, row_sequences
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.rope_ref import rope_ref, rope_table_ref
from pdkv_kernels.sparse_attention_ref import sparse_attention_ref
from torch import Tensor, split
from torch.nn import functional

from pdkv.m3.config import M3Config
from pdkv.m3.weights import AttentionWeights


class KvViews(Protocol):
    """Where the state lives. Views may have any strides but 1 in the last dimension; the arena owns the memory."""

    def view(self, name: str, layer: int) -> Tensor:
        """The pages of one kind of payload of one layer (global id), with only the kv heads of this rank.

        k, v: ``[num_pages, num_kv_heads, block_size, head_dim]``; k_scale, v_scale: ``[num_pages, num_kv_heads,
        block_size]``; index_k: ``[num_pages, block_size, index_dim]``.
        """
        ...


@dataclass(frozen=True)
class AttentionStep:
    """What all layers of one step share: who asks, where new tokens are stored, and the rope table."""

    queries: RaggedQueries
    page_ids: Tensor  # int64 [num_rows], page of each new token
    offsets: Tensor  # int64 [num_rows], its row in that page
    cos: Tensor  # float32 [num_rows, rotary_dim / 2]
    sin: Tensor  # float32 [num_rows, rotary_dim / 2]


def attention_step(queries: RaggedQueries, positions: Tensor, config: M3Config) -> AttentionStep:
    """Positions: int64 [num_rows]. Every row's page must be in the page table."""
    seqs = row_sequences(queries.query_starts)
    page_ids = queries.page_table[seqs, positions // BLOCK].long()
    assert page_ids.is_cuda or int(page_ids.min()) >= 0, "a token of the step has no page"
    cos, sin = rope_table_ref(positions, config.rotary_dim, config.rope_theta)
    return AttentionStep(queries, page_ids, positions % BLOCK, cos, sin)


@dataclass(frozen=True)
class Asked:
    """What the rows of a step ask of one layer's state, rotated; heads of this rank."""

    q: Tensor  # [num_rows, num_heads, head_dim]
    index_q: Tensor | None  # [num_rows, num_index_heads, index_dim], on sparse layers


def store(
    x: Tensor, layer: int, weights: AttentionWeights, step: AttentionStep, cache: KvViews, config: M3Config
) -> Asked:
    """Write the rows' K, V and index keys into their pages. x: [num_rows, hidden], normalised."""
    kinds = [config.num_heads, config.num_kv_heads, config.num_kv_heads]
    sparse = config.sparse_layers[layer]
    if sparse:
        kinds += [config.num_index_heads, 1]
    projected = functional.linear(x, weights.inputs).view(x.shape[0], sum(kinds), config.head_dim)
    q, k, v, *index = split(projected, kinds, dim=1)  # each [num_rows, heads, head_dim]
    kv_store_ref(_turned(k, weights.k_norm, step, config), cache.view("k", layer), step.page_ids, step.offsets)
    kv_store_ref(v, cache.view("v", layer), step.page_ids, step.offsets)
    q = _turned(q, weights.q_norm, step, config).to(x.dtype)
    if not sparse:
        return Asked(q, None)
    assert weights.index_q_norm is not None
    assert weights.index_k_norm is not None
    index_q, index_k = index
    index_k = _turned(index_k, weights.index_k_norm, step, config)[:, 0]
    kv_store_ref(index_k, cache.view("index_k", layer), step.page_ids, step.offsets)
    return Asked(q, _turned(index_q, weights.index_q_norm, step, config).to(x.dtype))


def attend(
    asked: Asked, layer: int, weights: AttentionWeights, step: AttentionStep, cache: KvViews, config: M3Config
) -> Tensor:
    """Read the state up to each row's own position: [num_rows, hidden] in q's dtype."""
    kv = PagedKv(cache.view("k", layer), cache.view("v", layer))
    scale = config.head_dim**-0.5
    if asked.index_q is None:
        out, _ = paged_attention_ref(asked.q, kv, step.queries, scale)
    else:
        forced = (config.topk_blocks, config.init_blocks, config.local_blocks)
        blocks = index_topk_ref(asked.index_q, cache.view("index_k", layer), step.queries, *forced)
        out, _ = sparse_attention_ref(asked.q, kv, blocks, step.queries, scale)
    return functional.linear(out.flatten(1), weights.output)


def _turned(x: Tensor, norm_weight: Tensor, step: AttentionStep, config: M3Config) -> Tensor:
    """Per-head norm and rope, float32 throughout, so that the caller rounds once."""
    return rope_ref(rms_norm_ref(x, norm_weight, config.rms_norm_eps), step.cos, step.sin)
