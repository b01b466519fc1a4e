"""The router in one launch behind its product, or together with it: sigmoid, biased choice, weights."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from pdkv_kernels.swigluoai import sigmoid

_FUSED_FROM = 6144
"""Rows from which product and choice are one kernel; with fewer, too few programs would share the product."""
_ROWS_CHOSEN = 4
_TILE_ROWS = 64
_TILE_HIDDEN = 64
_MOST_EXPERTS = 128
"""Scores of one row that a tile holds in registers."""


def router_topk(x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """``router_topk_ref`` for a float32 router: the same experts but for scores that are equal within rounding.

    Many 16-bit rows are multiplied by the matrix units: a float32 weight is the sum of three bfloat16 numbers, so that
    products are exact and sums float32, as they are in a float32 product.
    """
    num_rows, hidden = x.shape
    experts = weight.shape[0]
    ids = torch.empty(num_rows, k, dtype=torch.int64, device=x.device)
    shares = torch.empty(num_rows, k, dtype=torch.float32, device=x.device)
    if num_rows == 0:
        return ids, shares
    padded = max(16, triton.next_power_of_2(experts))
    fits = hidden % _TILE_HIDDEN == 0 and padded <= _MOST_EXPERTS
    if x.dtype == torch.bfloat16 and num_rows >= _FUSED_FROM and fits:
        _route[(triton.cdiv(num_rows, _TILE_ROWS),)](
            x, weight, bias, ids, shares, num_rows, hidden, x.stride(0), weight.stride(0), scaling,
            EXPERTS=experts, EXPERTS_P=padded, K=k, ROWS=_TILE_ROWS, STEP=_TILE_HIDDEN, num_warps=8, num_stages=3,
        )  # fmt: skip
        return ids, shares
    logits = functional.linear(x.float(), weight.float())
    _choose[(triton.cdiv(num_rows, _ROWS_CHOSEN),)](
        logits, bias, ids, shares, num_rows, scaling,
        EXPERTS=experts, EXPERTS_P=padded, K=k, ROWS=_ROWS_CHOSEN, num_warps=_ROWS_CHOSEN,
    )  # fmt: skip
    return ids, shares


@triton.jit
def _store_best(
    logits, bias, ids, shares, row, num_rows, scaling,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, K: tl.constexpr,
):  # fmt: skip
    """The K best of each row of float32 [rows, EXPERTS_P], best first, equal ones by number."""
    expert = tl.arange(0, EXPERTS_P)
    scores = sigmoid(logits)
    biased = scores + tl.load(bias + expert, mask=expert < EXPERTS, other=0.0)[None, :] + 0.0  # no -0
    bits = biased.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    rank = tl.where(biased != biased, 0x7FFFFFFF, rank).to(tl.int64)  # NaN comes first, as torch sorts it
    key = (rank << 32) | (EXPERTS_P - expert)[None, :].to(tl.int64)
    key = tl.where((expert < EXPERTS)[None, :], key, -(1 << 63))
    total = tl.zeros_like(tl.max(logits, axis=1))
    left = key
    for _ in tl.static_range(K):
        top = tl.max(left, axis=1)
        mine = left == top[:, None]
        total += tl.sum(tl.where(mine, scores, 0.0), axis=1)
        left = tl.where(mine, -(1 << 63), left)
    share = scaling / tl.maximum(total, 1e-20, propagate_nan=tl.PropagateNan.ALL)
    exists = row < num_rows
    for nth in tl.static_range(K):
        top = tl.max(key, axis=1)
        mine = key == top[:, None]
        score = tl.sum(tl.where(mine, scores, 0.0), axis=1)
        tl.store(ids + row * K + nth, EXPERTS_P - (top & 0x7FFFFFFF), mask=exists)
        tl.store(shares + row * K + nth, score * share, mask=exists)
        key = tl.where(mine, -(1 << 63), key)


@triton.jit(do_not_specialize=["num_rows"])
def _choose(
    logits, bias, ids, shares, num_rows, scaling,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS_P)
    at = logits + row[:, None] * EXPERTS + expert[None, :]
    scores = tl.load(at, mask=(row < num_rows)[:, None] & (expert < EXPERTS)[None, :], other=0.0)
    _store_best(scores, bias, ids, shares, row, num_rows, scaling, EXPERTS, EXPERTS_P, K)


@triton.jit(do_not_specialize=["num_rows"])
def _route(
    x, weight, bias, ids, shares, num_rows, hidden, x_row, weight_row, scaling,
    EXPERTS: tl.constexpr, EXPERTS_P: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, EXPERTS_P)
    column = tl.arange(0, STEP)
    x_at = x + row[:, None] * x_row + column[None, :]
    weight_at = weight + expert[:, None] * weight_row + column[None, :]
    logits = tl.zeros([ROWS, EXPERTS_P], tl.float32)
    for begin in range(0, hidden, STEP):
        a = tl.load(x_at + begin, mask=(row < num_rows)[:, None], other=0.0)
        w = tl.load(weight_at + begin, mask=(expert < EXPERTS)[:, None], other=0.0)
        high = w.to(tl.bfloat16)
        w = w - high.to(tl.float32)
        middle = w.to(tl.bfloat16)
        low = (w - middle.to(tl.float32)).to(tl.bfloat16)
        logits = tl.dot(a, tl.trans(low), logits)
        logits = tl.dot(a, tl.trans(middle), logits)
        logits = tl.dot(a, tl.trans(high), logits)
    _store_best(logits, bias, ids, shares, row, num_rows, scaling, EXPERTS, EXPERTS_P, K)
