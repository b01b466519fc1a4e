"""M3's gated activation in one pass over the projection."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.rounding import round_once

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_COLUMNS = 1024


def swigluoai(gate_up: Tensor, alpha: float, limit: float, beta: float) -> Tensor:
    """``swigluoai_ref`` rounded once into gate_up's dtype: [num_rows, size] of [num_rows, 2 * size].

    The sigmoid takes the device's exponential: within 4e-6 of the reference in float32, so that a 16-bit result is the
    reference's or, rarely, its neighbour.
    """
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty(num_rows, size, dtype=gate_up.dtype, device=gate_up.device)
    if out.numel() == 0:
        return out
    columns = min(_COLUMNS, triton.next_power_of_2(size))
    _swigluoai[(num_rows, triton.cdiv(size, columns))](
        gate_up, out, gate_up.stride(0), size, alpha, limit, beta,
        COLUMNS=columns, TYPE=_TRITON_TYPES[gate_up.dtype], PORTABLE=triton.knobs.runtime.interpret, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x), without overflow on either side."""
    power = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, power, 1.0) / (1.0 + power)


@triton.jit
def _swigluoai(
    gate_up, out, row_stride, size, alpha, limit, beta,
    COLUMNS: tl.constexpr, TYPE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < size
    at = gate_up + row * row_stride + column
    gate = tl.load(at, mask=there, other=0.0).to(tl.float32)
    up = tl.load(at + size, mask=there, other=0.0).to(tl.float32)
    gate = tl.minimum(gate, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.minimum(up, limit, propagate_nan=tl.PropagateNan.ALL)
    up = tl.maximum(up, -limit, propagate_nan=tl.PropagateNan.ALL)
    gated = gate * sigmoid(alpha * gate) * (up + beta)
    tl.store(out + row * size + column, round_once(gated, "float", TYPE, PORTABLE), mask=there)
