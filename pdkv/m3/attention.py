"""One layer's attention: store what the new tokens leave behind, then let them attend to it."""

from dataclasses import dataclass
from typing import Protocol

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv, RaggedQueries, row_sequences
from pdkv_kernels.rope_ref import rope_table_ref
from torch import Tensor
from torch.nn import functional

from pdkv.errors import ModelError
from pdkv.m3.config import M3Config
from pdkv.m3.operations import Operations, StepQueries
from pdkv.m3.weights import AttentionWeights


class KvViews(Protocol):
    """Where the state lives. Views may have any strides but 1 in the last dimension; the arena owns the memory."""

    def view(self, name: str, layer: int) -> Tensor:
        """The pages of one kind of payload of one layer (global id), with only the kv heads of this rank.

        k, v: ``[num_pages, num_kv_heads, block_size, head_dim]``; k_scale, v_scale: ``[num_pages, num_kv_heads,
        block_size]``; index_k: ``[num_pages, block_size, index_dim]``. Raises ``KeyError`` for what is not kept.
        """
        ...

    def has(self, name: str, layer: int) -> bool:
        """Whether this kind of payload is kept of this layer."""
        ...


@dataclass(frozen=True)
class StepBatch:
    """One step for several sequences, ragged; prefill chunks and decode rows mix freely. All on the model's device.

    Sequence s owns the rows ``query_starts[s]`` to ``query_starts[s + 1]`` of the flattened tokens; its row i stands
    at position ``context_lens[s] + i``. Its pages must hold room for every position up to its last row.
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    query_starts: Tensor  # int32 [num_seqs + 1]
    context_lens: Tensor  # int32 [num_seqs], tokens in the cache before this step
    page_table: Tensor  # int32 [num_seqs, max_blocks], physical page of each block, padded with -1
    logits_rows: Tensor  # int64 [num_logits], rows of the flattened tokens whose logits are wanted
    query_len: int = 0
    """Rows of every sequence, where all have equally many and few (a decode step); else 0."""
    stored_from: Tensor | None = None  # int32 [num_seqs]
    """Rows at earlier positions fill a decode step up to its shape: nothing of them is stored."""


@dataclass(frozen=True)
class AttentionStep:
    """What all layers of one step share: who asks, where new tokens are stored, the rope table, and what computes."""

    queries: StepQueries
    rows: TokenRows
    operations: Operations


def attention_step(batch: StepBatch, config: M3Config, operations: Operations) -> AttentionStep:
    """Every row that is stored must have its page in the page table."""
    ragged = RaggedQueries(batch.query_starts, batch.context_lens, batch.page_table)
    positions = batch.positions
    decode = None
    if batch.query_len:
        # Settled: of a layer's kernels only the store may still run when the indexer's first begins, for in front of it
        # is the projection, an ordinary launch; all that the scan reads but the step's own keys is older than that.
        lens = batch.context_lens + batch.query_len
        decode = DecodeBatch(lens, batch.page_table, batch.query_len, settled=True)
        seqs = torch.arange(positions.numel(), device=positions.device) // batch.query_len
    else:
        seqs = row_sequences(batch.query_starts)
    page_ids = batch.page_table[seqs, (positions // BLOCK).clamp(min=0)].long()
    slots = page_ids * BLOCK + positions % BLOCK
    if batch.stored_from is not None:
        slots = torch.where(positions >= batch.stored_from[seqs], slots, -1)
    assert page_ids.is_cuda or int(page_ids.min()) >= 0, "a token of the step has no page"
    cos, sin = rope_table_ref(positions, config.rotary_dim, config.rope_theta)
    return AttentionStep(StepQueries(ragged, decode), TokenRows(slots, cos, sin), operations)


def store(
    x: Tensor, layer: int, weights: AttentionWeights, step: AttentionStep, cache: KvViews, config: M3Config
) -> Queries:
    """Write the rows' K, V and index keys into their pages. x: [num_rows, hidden], normalised.

    Head counts are those of this rank: of the weights, and of the pages that they write into. A layer that reuses a
    selection projects index keys as all sparse ones do, and leaves them at that.
    """
    kv = _paged_kv(cache, layer)
    index_k = cache.view("index_k", layer) if config.selecting_layers[layer] else None
    num_kv = kv.k.shape[1]
    num_q = weights.output.shape[1] // config.head_dim
    heads = PackedHeads(num_q, num_kv, num_kv if config.sparse_layers[layer] else 0)
    packed = functional.linear(x, weights.inputs).view(x.shape[0], -1, config.head_dim)
    norms = HeadNorms(weights.q_norm, weights.k_norm, weights.index_q_norm, weights.index_k_norm, config.rms_norm_eps)
    return step.operations.kv_store(packed, heads, norms, step.rows, LayerPages(kv, index_k))


def select(
    asked: Queries, layer: int, step: AttentionStep, cache: KvViews, config: M3Config, before: Tensor | None
) -> Tensor:
    """Blocks that the rows attend to in a sparse layer: int32 [num_rows, num_kv_heads, topk].

    A layer that reuses takes ``before``, what the last sparse layer of this very step gave; it has no index keys to
    select by. Raises ``ModelError`` where there is none: it would be another step's or nobody's choice.
    """
    if config.selecting_layers[layer]:
        assert asked.index_q is not None, "a layer that selects has stored its index keys"
        forced = (config.topk_blocks, config.init_blocks, config.local_blocks)
        return step.operations.select(asked.index_q, cache.view("index_k", layer), step.queries, forced)
    if before is None:
        raise ModelError(
            f"layer {layer} reuses a selection, and no layer of this step has made one; index schedule: layers "
            f"{', '.join(map(str, config.reusing_layers))} reuse"
        )
    return before


def attend(
    asked: Queries, blocks: Tensor | None, layer: int, weights: AttentionWeights, step: AttentionStep, cache: KvViews
) -> Tensor:
    """Read the state up to each row's own position: [num_rows, hidden] in q's dtype, this rank's part of a sum.

    ``blocks`` as ``select`` gives them; None: the layer is dense, and all is read.
    """
    kv = _paged_kv(cache, layer)
    scale = asked.q.shape[-1] ** -0.5
    if blocks is None:
        out = step.operations.attend_to_all(asked.q, kv, step.queries, scale)
    else:
        out = step.operations.attend_to_chosen(asked.q, kv, blocks, step.queries, scale)
    return functional.linear(out.flatten(1), weights.output)


def _paged_kv(cache: KvViews, layer: int) -> PagedKv:
    scaled = cache.has("k_scale", layer)
    scales = [cache.view(name, layer) if scaled else None for name in ("k_scale", "v_scale")]
    return PagedKv(cache.view("k", layer), cache.view("v", layer), *scales)
