"""The routed experts on a GPU: two grouped matrix products over rows sorted by expert, and no word from the host."""

import torch
from torch import Tensor

from pdkv_kernels.moe_combine import moe_combine
from pdkv_kernels.swigluoai import swigluoai


def moe_grouped(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: tuple[float, float, float],
    first: int = 0,
) -> Tensor:
    """``moe_ref`` for the experts ``first``, ``first + 1``, ... that ``gate_up`` and ``down`` hold; others add nothing.

    Launches depend on shapes alone where torch has a grouped kernel (bfloat16, from Hopper on), so a CUDA graph may
    hold them; elsewhere torch loops over experts and reads their sizes. The sum over a row's experts has a fixed order.
    x: [num_rows, hidden]; ids: int64 [num_rows, k], global. Returns float32 [num_rows, hidden].
    """
    num_rows, k = ids.shape
    held = gate_up.shape[0]
    local = ids.flatten() - first
    local = torch.where((local >= 0) & (local < held), local, held)  # those of other ranks come last
    sorted_ids, order = local.sort(stable=True)  # int64 [num_rows * k]
    # How many pairs belong to an expert or to one before it: where its group ends.
    ends = torch.searchsorted(sorted_ids, torch.arange(held, device=x.device), right=True).int()
    both = torch._grouped_mm(x[order // k], gate_up.transpose(1, 2), offs=ends)  # [num_rows * k, 2 * size]
    results = torch._grouped_mm(swigluoai(both, *activation), down.transpose(1, 2), offs=ends)
    # Rows behind the last group hold whatever the memory held, NaN too: they are never looked at.
    places = torch.empty_like(order).scatter_(0, order, torch.arange(num_rows * k, device=x.device))
    return moe_combine(results, places, weights, ends[-1:])


def can_group(x: Tensor, gate_up: Tensor, down: Tensor) -> bool:
    """Whether torch's grouped product takes these: its rows must begin at multiples of 16 bytes."""
    widths = (gate_up.shape[1], gate_up.shape[2], down.shape[1], down.shape[2])
    return all(width * x.element_size() % 16 == 0 for width in widths)
