"""Operations on GPUs by our Triton kernels and torch's grouped matrix product."""

import torch
from pdkv_kernels.hardware import hardware
from pdkv_kernels.index_topk_decode import IndexWorkspace, SelectionRule, index_topk_decode_into
from pdkv_kernels.index_topk_prefill import DEFAULT_TUNING, ScoreTuning, index_topk_prefill
from pdkv_kernels.kv_store import kv_store
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows
from pdkv_kernels.moe_grouped import can_group, moe_grouped
from pdkv_kernels.paged import LayerPages, PagedKv
from pdkv_kernels.paged_attention_decode import dense_plan, paged_attention_decode_into
from pdkv_kernels.paged_attention_prefill import paged_attention_prefill
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.rms_norm import add_rms_norm, rms_norm
from pdkv_kernels.router_topk import router_topk
from pdkv_kernels.softmax_merge import MergeWorkspace
from pdkv_kernels.sparse_attention_decode import attend_plan, sparse_attention_decode_into
from pdkv_kernels.sparse_attention_prefill import PrefillTuning, sparse_attention_prefill
from pdkv_kernels.swigluoai import swigluoai
from torch import Tensor

from pdkv.m3.operations import Experts, ReferenceOperations, StepQueries

_EXACT_SCORES = ScoreTuning(tile_rows=16, warps=8)
_EXACT_ATTENTION = PrefillTuning(page_rows=16, page_warps=8, tile_rows=16)
"""For float32: no matrix unit takes it exactly, so every product is an instruction, and kernels of large tiles compile
for minutes."""

_EXACT_BYTES = 72 << 10
"""Shared memory that these tiles take in a prefill; with less the references compute."""
_GROUPED_FROM = 90
"""Capability from which torch's grouped product is one kernel, and no loop that reads group sizes."""


class TritonOperations:
    """See ``Operations``. Workspaces come from torch's allocator for each call: a CUDA graph keeps its own."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.can_capture = hardware().capability >= _GROUPED_FROM and dtype == torch.bfloat16
        self._references = ReferenceOperations()

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm(x, weight, eps)

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        return add_rms_norm(x, more, weight, eps)

    def activate(self, gate_up: Tensor, activation: tuple[float, float, float]) -> Tensor:
        return swigluoai(gate_up, *activation)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
        return router_topk(x, weight, bias, k, scaling)

    def kv_store(
        self, packed: Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages
    ) -> Queries:
        return kv_store(packed, heads, norms, rows, pages)

    def select(self, index_q: Tensor, index_k: Tensor, queries: StepQueries, forced: tuple[int, int, int]) -> Tensor:
        if queries.decode is None and lacks_room(index_q):
            return self._references.select(index_q, index_k, queries, forced)
        if queries.decode is None:
            tuning = _EXACT_SCORES if index_q.dtype == torch.float32 else DEFAULT_TUNING
            return index_topk_prefill(index_q, index_k, queries.ragged, *forced, tuning=tuning)
        num_rows, heads, _ = index_q.shape
        out = torch.empty(num_rows, heads, forced[0], dtype=torch.int32, device=index_q.device)
        workspace = IndexWorkspace(num_rows, heads, queries.ragged.page_table.shape[1], index_q.device)
        index_topk_decode_into(out, index_q, index_k, queries.decode, SelectionRule(*forced), workspace)
        return out

    def attend_to_all(self, q: Tensor, kv: PagedKv, queries: StepQueries, scale: float) -> Tensor:
        if queries.decode is None and q.dtype == torch.float32:  # exact products, which no matrix unit has
            return paged_attention_ref(q, kv, queries.ragged, scale)[0]
        if queries.decode is None:
            return paged_attention_prefill(q, kv, queries.ragged, scale)[0]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        plan = dense_plan(queries.decode, q, kv)
        workspace = MergeWorkspace(q, plan.splits)
        paged_attention_decode_into(out, lse, q, kv, queries.decode, scale, workspace, plan)
        return out

    def attend_to_chosen(self, q: Tensor, kv: PagedKv, blocks: Tensor, queries: StepQueries, scale: float) -> Tensor:
        if queries.decode is None and lacks_room(q):
            return self._references.attend_to_chosen(q, kv, blocks, queries, scale)
        if queries.decode is None:
            tuning = _EXACT_ATTENTION if q.dtype == torch.float32 else None
            return sparse_attention_prefill(q, kv, blocks, queries.ragged, scale, tuning=tuning)[0]
        out = torch.empty_like(q)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        plan = attend_plan(q, kv, queries.decode, blocks.shape[2])
        workspace = MergeWorkspace(q, plan.splits)
        sparse_attention_decode_into(out, lse, q, kv, blocks, queries.decode, scale, workspace, plan)
        return out

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        if not can_group(x, experts.gate_up, experts.down):
            return self._references.mix(x, ids, weights, experts)
        return moe_grouped(x, ids, weights, experts.gate_up, experts.down, experts.activation, experts.first)


def lacks_room(q: Tensor) -> bool:
    """Whether the device has no room for the tiles that rows of a prefill in q's dtype would take."""
    return q.dtype == torch.float32 and hardware().shared_bytes < _EXACT_BYTES
