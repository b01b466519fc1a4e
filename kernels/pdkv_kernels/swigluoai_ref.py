"""M3's gated activation: a clamped gate through a steep sigmoid, times a clamped up-projection plus one."""

from torch import Tensor


def swigluoai_ref(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """gate_up: [..., 2 * size], all gates before all ups; returns float32 [..., size].

    The gate has no lower clamp. ``beta`` is the summand of the up-projection, 1.0 in the released model.
    """
    gate, up = gate_up.float().chunk(2, dim=-1)
    gate = gate.clamp(max=limit)
    up = up.clamp(min=-limit, max=limit)
    return gate * (alpha * gate).sigmoid() * (up + beta)
