"""The routed experts: each runs once, on all rows that chose it."""

import torch
from torch import Tensor
from torch.nn import functional

from pdkv_kernels.swigluoai_ref import swigluoai_ref


def moe_ref(
    x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: tuple[float, float, float]
) -> Tensor:
    """Weighted sum of the chosen experts; experts that nobody chose are not touched.

    x: [num_rows, hidden]; ids: int64 [num_rows, k]; weights: float32 [num_rows, k]; gate_up: [num_experts, 2 * size,
    hidden]; down: [num_experts, hidden, size]; activation: (alpha, limit, beta). Returns float32 [num_rows, hidden].
    """
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    order = ids.flatten().argsort(stable=True)  # (row, choice) pairs, those of one expert side by side
    rows = order // ids.shape[1]
    pair_weights = weights.flatten()[order, None]
    start = 0
    for expert, count in enumerate(ids.flatten().bincount(minlength=gate_up.shape[0]).tolist()):
        if count == 0:
            continue
        mine = slice(start, start + count)
        hidden = swigluoai_ref(functional.linear(x[rows[mine]], gate_up[expert]), *activation)
        result = functional.linear(hidden.to(x.dtype), down[expert]).float()
        out.index_add_(0, rows[mine], result * pair_weights[mine])
        start += count
    return out
