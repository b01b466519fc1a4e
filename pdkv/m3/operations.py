"""What layers compute with: torch references on any device, Triton kernels on GPUs. One place chooses.

An operation gets the same arguments whichever it is, and means what its reference says.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_topk_ref import index_topk_ref
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows, kv_store_ref
from pdkv_kernels.moe_ref import moe_ref
from pdkv_kernels.paged import LayerPages, PagedKv, RaggedQueries
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.router_topk_ref import router_topk_ref
from pdkv_kernels.sparse_attention_ref import sparse_attention_ref
from pdkv_kernels.swigluoai_ref import swigluoai_ref
from torch import Tensor

from pdkv.m3.config import M3Config


@dataclass(frozen=True)
class StepQueries:
    """The query rows of one step. ``decode`` says the same once more where every sequence has equally many, few rows:
    some operations have a faster way then, and one that a CUDA graph can hold."""

    ragged: RaggedQueries
    decode: DecodeBatch | None = None


@dataclass(frozen=True)
class Experts:
    """Routed experts that this rank holds: the ``first`` of them all, and those that follow."""

    gate_up: Tensor  # [held experts, 2 * size, hidden]
    down: Tensor  # [held experts, hidden, size]
    first: int
    activation: tuple[float, float, float]  # alpha, limit, beta


class Operations(Protocol):
    """Stateless but for workspaces, which one step at a time uses; so one model's steps must not overlap."""

    can_capture: bool
    """A CUDA graph may hold a decode step: nothing reads the device back or launches by what is in a tensor."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``rms_norm_ref``, rounded once into x's dtype: [num_rows, dim]."""
        ...

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """x + more, and ``norm`` of that sum as x's dtype holds it."""
        ...

    def activate(self, gate_up: Tensor, activation: tuple[float, float, float]) -> Tensor:
        """``swigluoai_ref``, rounded once into gate_up's dtype: [num_rows, size]; activation: alpha, limit, beta."""
        ...

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
        """``router_topk_ref``: ids, int64, and shares, float32, [num_rows, k] each."""
        ...

    def kv_store(
        self, packed: Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages
    ) -> Queries:
        """``kv_store_ref``."""
        ...

    def select(
        self, index_q: Tensor, index_k: Tensor, queries: StepQueries, forced: tuple[int, int, int]
    ) -> Tensor:  # int32 [num_rows, heads, topk]
        """``index_topk_ref``; ``forced``: topk, init_blocks, local_blocks."""
        ...

    def attend_to_all(self, q: Tensor, kv: PagedKv, queries: StepQueries, scale: float) -> Tensor:
        """``paged_attention_ref``, its first result: [num_rows, num_heads, head_dim]."""
        ...

    def attend_to_chosen(
        self, q: Tensor, kv: PagedKv, blocks: Tensor, queries: StepQueries, scale: float
    ) -> Tensor:  # [num_rows, num_heads, head_dim]
        """``sparse_attention_ref``, its first result."""
        ...

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        """``moe_ref`` of the experts held here; ``ids`` are global, and others' add nothing. float32."""
        ...


class ReferenceOperations:
    """Torch on any device. Reads the device back, where there is one: slow there, and never captured."""

    can_capture = False

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        return rms_norm_ref(x, weight, eps).to(x.dtype)

    def add_norm(self, x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        total = x + more
        return total, self.norm(total, weight, eps)

    def activate(self, gate_up: Tensor, activation: tuple[float, float, float]) -> Tensor:
        return swigluoai_ref(gate_up, *activation).to(gate_up.dtype)

    def route(self, x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
        return router_topk_ref(x, weight, bias, k, scaling)

    def kv_store(
        self, packed: Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages
    ) -> Queries:
        return kv_store_ref(packed, heads, norms, rows, pages)

    def select(self, index_q: Tensor, index_k: Tensor, queries: StepQueries, forced: tuple[int, int, int]) -> Tensor:
        return index_topk_ref(index_q, index_k, queries.ragged, *forced)

    def attend_to_all(self, q: Tensor, kv: PagedKv, queries: StepQueries, scale: float) -> Tensor:
        return paged_attention_ref(q, kv, queries.ragged, scale)[0]

    def attend_to_chosen(self, q: Tensor, kv: PagedKv, blocks: Tensor, queries: StepQueries, scale: float) -> Tensor:
        return sparse_attention_ref(q, kv, blocks, queries.ragged, scale)[0]

    def mix(self, x: Tensor, ids: Tensor, weights: Tensor, experts: Experts) -> Tensor:
        held = experts.gate_up.shape[0]
        local = ids - experts.first
        ours = (local >= 0) & (local < held)
        if bool(ours.all()):
            return moe_ref(x, local, weights, experts.gate_up, experts.down, experts.activation)
        # Some whole experts: each of the pairs (row, choice) that are ours counts as a row with a single choice.
        rows, choices = torch.nonzero(ours, as_tuple=True)
        mine = local[rows, choices, None], weights[rows, choices, None]
        pairs = moe_ref(x[rows], *mine, experts.gate_up, experts.down, experts.activation)
        return torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, rows, pairs)


def operations_for(config: M3Config, device: torch.device, dtype: torch.dtype) -> Operations:
    """Triton kernels on a GPU, for head sizes that they can take; else the references.

    ``dtype``: of the weights.
    """
    if device.type != "cuda" or not all(_fits_tiles(size) for size in (config.head_dim, config.index_dim)):
        return ReferenceOperations()
    from pdkv.m3.triton_operations import TritonOperations  # noqa: PLC0415  needs Triton, which a CPU goes without

    return TritonOperations(dtype)


def _fits_tiles(size: int) -> bool:
    """Powers of two, from the least that a matrix unit takes."""
    return size >= 16 and size & (size - 1) == 0
