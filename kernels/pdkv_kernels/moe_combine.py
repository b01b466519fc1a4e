"""What experts gave for each row, weighted and summed in one pass over rows that are still sorted by expert."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_COLUMNS = 1024


def moe_combine(results: Tensor, places: Tensor, weights: Tensor, num_ours: Tensor) -> Tensor:
    """Sum over each row's choices, in their order, of weight times result: float32 [num_rows, hidden].

    results: [num_rows * k, hidden] of any float, sorted by expert; places: int64 [num_rows * k], where each choice's
    result is; weights: float32 [num_rows, k]; num_ours: int32 [1]. Results from that place on are never read: they
    belong to other ranks' experts, and add nothing.
    """
    num_rows, k = weights.shape
    hidden = results.shape[1]
    assert results.stride(1) == places.stride(0) == 1
    assert weights.is_contiguous()
    out = torch.empty(num_rows, hidden, dtype=torch.float32, device=results.device)
    if out.numel() == 0:
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(hidden))
    _combine[(num_rows, triton.cdiv(hidden, columns))](
        results, places, weights, num_ours, out, results.stride(0), hidden,
        K=k, COLUMNS=columns, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out


@triton.jit
def _combine(
    results, places, weights, num_ours, out, results_row, hidden, K: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    end = tl.load(num_ours)
    total = tl.zeros([COLUMNS], tl.float32)
    for nth in tl.static_range(K):
        place = tl.load(places + row * K + nth)
        there = (column < hidden) & (place < end)
        result = tl.load(results + place * results_row + column, mask=there, other=0.0).to(tl.float32)
        total += tl.where(place < end, result * tl.load(weights + row * K + nth), 0.0)
    tl.store(out + row * hidden + column, total, mask=column < hidden)
