"""The router of the mixture of experts: sigmoid scores; the bias takes part in the choice only."""

import torch
from torch import Tensor
from torch.nn import functional


def router_topk_ref(x: Tensor, weight: Tensor, bias: Tensor, k: int, scaling: float) -> tuple[Tensor, Tensor]:
    """Choose k experts for each row. x: [num_rows, hidden], weight: [num_experts, hidden], bias: [num_experts].

    Returns expert ids, int64 [num_rows, k], best first (equal scores: lower id first), and their weights, float32
    [num_rows, k], which sum to ``scaling`` in each row.
    """
    scores = functional.linear(x.float(), weight.float()).sigmoid()
    order = torch.sort(scores + bias.float(), dim=-1, descending=True, stable=True).indices
    ids = order[:, :k]
    chosen = scores.gather(1, ids)
    return ids, chosen * (scaling / chosen.sum(dim=-1, keepdim=True).clamp(min=1e-20))
