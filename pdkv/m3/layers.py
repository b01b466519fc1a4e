"""The parts of a layer that look at one token alone: norms, dense MLP, mixture of experts."""

import torch
from pdkv_kernels.moe_ref import moe_ref
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.router_topk_ref import router_topk_ref
from pdkv_kernels.swigluoai_ref import swigluoai_ref
from torch import Tensor
from torch.nn import functional

from pdkv.m3.config import M3Config
from pdkv.m3.weights import MlpWeights, MoeWeights


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma RMS norm of [num_rows, dim] in float32, rounded once into x's dtype."""
    return rms_norm_ref(x, weight, eps).to(x.dtype)


def feed_forward(x: Tensor, weights: MlpWeights | MoeWeights, config: M3Config) -> Tensor:
    """x: [num_rows, hidden], normalised; returns this rank's part of the sum, in the same shape and dtype."""
    if isinstance(weights, MlpWeights):
        return mlp(x, weights, config)
    return mixture_of_experts(x, weights, config)


def mlp(x: Tensor, weights: MlpWeights, config: M3Config) -> Tensor:
    gate_up = functional.linear(x, weights.gate_up)  # [num_rows, 2 * size]
    hidden = swigluoai_ref(gate_up, config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
    return functional.linear(hidden.to(x.dtype), weights.down)


def mixture_of_experts(x: Tensor, weights: MoeWeights, config: M3Config) -> Tensor:
    """Routed experts plus the shared one, which is neither gated nor scaled.

    Every rank routes alike: x is the same bit for bit on all, and so are the router's weights.
    """
    ids, shares = router_topk_ref(
        x, weights.router, weights.router_bias, config.experts_per_token, config.routed_scaling_factor
    )
    activation = (config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
    if len(weights.experts) == config.num_experts:
        routed = moe_ref(x, ids, shares, weights.gate_up, weights.down, activation)
    else:
        # Some whole experts: each of the pairs (row, choice) that are ours counts as a row with a single choice.
        first, end = weights.experts.start, weights.experts.stop
        rows, choices = torch.nonzero((ids >= first) & (ids < end), as_tuple=True)
        local, mine = ids[rows, choices, None] - first, shares[rows, choices, None]
        pairs = moe_ref(x[rows], local, mine, weights.gate_up, weights.down, activation)
        routed = torch.zeros(x.shape, dtype=torch.float32, device=x.device).index_add_(0, rows, pairs)
    return routed.to(x.dtype) + mlp(x, weights.shared, config)
