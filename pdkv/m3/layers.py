"""The parts of a layer that look at one token alone: norms, dense MLP, mixture of experts."""

from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.router_topk_ref import router_topk_ref
from pdkv_kernels.swigluoai_ref import swigluoai_ref
from torch import Tensor
from torch.nn import functional

from pdkv.m3.config import M3Config
from pdkv.m3.operations import Experts, Operations
from pdkv.m3.weights import MlpWeights, MoeWeights


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Gemma RMS norm of [num_rows, dim] in float32, rounded once into x's dtype."""
    return rms_norm_ref(x, weight, eps).to(x.dtype)


def feed_forward(x: Tensor, weights: MlpWeights | MoeWeights, config: M3Config, operations: Operations) -> Tensor:
    """x: [num_rows, hidden], normalised; returns this rank's part of the sum, in the same shape and dtype."""
    if isinstance(weights, MlpWeights):
        return mlp(x, weights, config)
    return mixture_of_experts(x, weights, config, operations)


def mlp(x: Tensor, weights: MlpWeights, config: M3Config) -> Tensor:
    gate_up = functional.linear(x, weights.gate_up)  # [num_rows, 2 * size]
    hidden = swigluoai_ref(gate_up, config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
    return functional.linear(hidden.to(x.dtype), weights.down)


def mixture_of_experts(x: Tensor, weights: MoeWeights, config: M3Config, operations: Operations) -> Tensor:
    """Routed experts plus the shared one, which is neither gated nor scaled.

    Every rank routes alike: x is the same bit for bit on all, and so are the router's weights.
    """
    ids, shares = router_topk_ref(
        x, weights.router, weights.router_bias, config.experts_per_token, config.routed_scaling_factor
    )
    activation = (config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta)
    routed = operations.mix(x, ids, shares, Experts(weights.gate_up, weights.down, weights.experts.start, activation))
    return routed.to(x.dtype) + mlp(x, weights.shared, config)
