"""From a layer's packed projection to its queries and its pages: norm, rope, one rounding, insertion."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv_kernels.cast_store_ref import cast_store_ref
from pdkv_kernels.paged import LayerPages
from pdkv_kernels.quantise_ref import FORMATS, quantise_ref
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.rope_ref import rope_ref


@dataclass(frozen=True)
class PackedHeads:
    """Heads of a packed projection, in its order: q, k, v, index_q, and one index_k if there is any index_q."""

    q: int
    kv: int
    index_q: int = 0

    @property
    def total(self) -> int:
        return self.q + 2 * self.kv + (self.index_q + 1 if self.index_q else 0)


@dataclass(frozen=True)
class HeadNorms:
    """Zero-centred weights of the per-head norms, [head_dim] each, shared by all heads of a kind. V has none."""

    q: Tensor
    k: Tensor
    index_q: Tensor | None
    index_k: Tensor | None
    eps: float


@dataclass(frozen=True)
class TokenRows:
    """What all layers of a step share: where each row goes, and by how much it is rotated."""

    slots: Tensor  # int64 [num_rows], page * BLOCK + offset; -1 stores nothing
    cos: Tensor  # float32 [num_rows, rotary_dim / 2]
    sin: Tensor  # float32 [num_rows, rotary_dim / 2]


@dataclass(frozen=True)
class Queries:
    """What the rows ask, rotated; rounded once to the dtype that each tensor has."""

    q: Tensor  # [num_rows, q heads, head_dim]
    index_q: Tensor | None  # [num_rows, index_q heads, head_dim], on layers that select blocks themselves


def kv_store_ref(
    packed: Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages, out: Queries | None = None
) -> Queries:
    """Write K, V and index keys of the rows into their pages, and return their queries.

    packed: [num_rows, heads.total, head_dim] of any float. Everything is float32 from the norm through the rope, then
    rounded once: K, V and index keys as ``cast_store_ref`` does it, q to packed's dtype, index_q to the dtype of the
    index keys where that is fp8 (scores are then dot products of equals), else to packed's. ``out`` holds buffers to
    fill, in dtypes of their own; a row without a slot is filled too.

    Where ``pages.index_k`` is None, index parts of the projection are passed over: a layer that takes over another's
    selection has them, but neither writes index keys nor asks for any.
    """
    assert packed.shape[1] == heads.total, f"{packed.shape[1]} heads projected, {heads} are {heads.total}"
    counts = [heads.q, heads.kv, heads.kv, heads.total - heads.q - 2 * heads.kv]
    q, k, v, index = torch.split(packed, counts, dim=1)  # each [num_rows, heads, head_dim]
    kv = pages.kv
    cast_store_ref(_turned(k, norms.k, norms.eps, rows), kv.k, rows.slots, kv.k_scale)
    cast_store_ref(v, kv.v, rows.slots, kv.v_scale)
    wide_q = _turned(q, norms.q, norms.eps, rows)
    wide_index_q = None
    index_dtype = packed.dtype
    if pages.index_k is not None:
        assert heads.index_q, "a layer that selects blocks projects index_q and index_k"
        assert norms.index_q is not None, "a layer that selects blocks has norms of index_q and index_k"
        assert norms.index_k is not None, "a layer that selects blocks has norms of index_q and index_k"
        index_k = _turned(index[:, -1:], norms.index_k, norms.eps, rows)[:, 0]
        cast_store_ref(index_k, pages.index_k, rows.slots)
        wide_index_q = _turned(index[:, :-1], norms.index_q, norms.eps, rows)
        index_dtype = pages.index_k.dtype if pages.index_k.dtype in FORMATS else packed.dtype
    if out is None:
        index_q = None if wide_index_q is None else quantise_ref(wide_index_q, index_dtype)
        return Queries(quantise_ref(wide_q, packed.dtype), index_q)
    out.q.copy_(quantise_ref(wide_q, out.q.dtype))
    if wide_index_q is not None:
        assert out.index_q is not None, "a layer that selects blocks needs a buffer for index_q"
        out.index_q.copy_(quantise_ref(wide_index_q, out.index_q.dtype))
    return out


def _turned(x: Tensor, weight: Tensor, eps: float, rows: TokenRows) -> Tensor:
    """Per-head norm and rope: float32 [num_rows, heads, head_dim]."""
    return rope_ref(rms_norm_ref(x, weight, eps), rows.cos, rows.sin)
