"""The parts of a layer that look at one token alone: dense MLP, mixture of experts."""

from torch import Tensor
from torch.nn import functional

from pdkv.m3.config import M3Config
from pdkv.m3.operations import Experts, Operations
from pdkv.m3.weights import MlpWeights, MoeWeights


def feed_forward(x: Tensor, weights: MlpWeights | MoeWeights, config: M3Config, operations: Operations) -> Tensor:
    """x: [num_rows, hidden], normalised; returns this rank's part of the sum, in the same shape and dtype."""
    if isinstance(weights, MlpWeights):
        return mlp(x, weights, config, operations)
    return mixture_of_experts(x, weights, config, operations)


def mlp(x: Tensor, weights: MlpWeights, config: M3Config, operations: Operations) -> Tensor:
    gate_up = functional.linear(x, weights.gate_up)  # [num_rows, 2 * size]
    return functional.linear(operations.activate(gate_up, _activation(config)), weights.down)


def mixture_of_experts(x: Tensor, weights: MoeWeights, config: M3Config, operations: Operations) -> Tensor:
    """Routed experts plus the shared one, which is neither gated nor scaled.

    Every rank routes alike: x is the same bit for bit on all, and so are the router's weights.
    """
    ids, shares = operations.route(
        x, weights.router, weights.router_bias, config.experts_per_token, config.routed_scaling_factor
    )
    experts = Experts(weights.gate_up, weights.down, weights.experts.start, _activation(config))
    routed = operations.mix(x, ids, shares, experts)
    return routed.to(x.dtype) + mlp(x, weights.shared, config, operations)


def _activation(config: M3Config) -> tuple[float, float, float]:
    return config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta
