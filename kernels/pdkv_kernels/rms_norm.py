"""RMS norm of whole rows in one pass, alone or behind the sum that it norms: each row is read once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.rounding import round_once

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_PART = 2048
"""Columns that a program holds as one tensor."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm_ref`` rounded into x's dtype, bit for bit. x: [num_rows, dim], weight: [dim]."""
    return _launch(x, None, weight, eps)[1]


def add_rms_norm(x: Tensor, more: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + more, and ``rms_norm_ref`` of that rounded sum, both in x's dtype, bit for bit. more: like x."""
    assert more.shape == x.shape
    assert more.dtype == x.dtype
    return _launch(x, more, weight, eps)


def _launch(x: Tensor, more: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    num_rows, dim = x.shape
    assert x.stride(1) == weight.stride(0) == 1
    assert more is None or more.stride(1) == 1
    normed = torch.empty(num_rows, dim, dtype=x.dtype, device=x.device)
    total = x if more is None else torch.empty_like(normed)
    if num_rows == 0:
        return total, normed
    part = min(_PART, triton.next_power_of_2(dim))
    _rms_norm[(num_rows,)](
        x, x if more is None else more, weight, total, normed, x.stride(0), 0 if more is None else more.stride(0),
        DIM=dim, PART=part, PARTS=triton.cdiv(dim, part), EPS=eps, ADDS=more is not None, TYPE=_TRITON_TYPES[x.dtype],
        PORTABLE=triton.knobs.runtime.interpret, num_warps=8 if part == _PART else 2, enable_fp_fusion=False,
    )  # fmt: skip
    return total, normed


@triton.jit
def inverse_root(x):
    """1 / sqrt(x) of float64, rounded to float32: two steps of Newton from float32's estimate."""
    finite = tl.where(x == float("inf"), 1.0, x)
    root = tl.rsqrt(finite.to(tl.float32)).to(tl.float64)
    root = root * (1.5 - 0.5 * finite * root * root)
    root = root * (1.5 - 0.5 * finite * root * root)
    return tl.where(x == float("inf"), 0.0, root).to(tl.float32)


@triton.jit
def _rms_norm(
    x, more, weight, total, normed, x_row, more_row,
    DIM: tl.constexpr, PART: tl.constexpr, PARTS: tl.constexpr, EPS: tl.constexpr, ADDS: tl.constexpr,
    TYPE: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, PART)
    kept: tl.tuple = ()
    squares = tl.zeros([PART], tl.float64)
    for nth in tl.static_range(PARTS):
        at = nth * PART + column
        there = at < DIM
        a = tl.load(x + row * x_row + at, mask=there, other=0.0).to(tl.float32)
        if ADDS:
            a = round_once(
                a + tl.load(more + row * more_row + at, mask=there, other=0.0).to(tl.float32), "float", TYPE, PORTABLE
            )
            tl.store(total + row * DIM + at, a, mask=there)
            a = a.to(tl.float32)
        kept = kept + (a,)
        # In float64 the sum does not depend on its order, so every device and tile size rounds to the same float32.
        squares += (a * a).to(tl.float64)
    mean = tl.sum(squares, axis=0) / DIM + tl.full([], EPS, tl.float64)
    inverse = inverse_root(mean)
    for nth in tl.static_range(PARTS):
        at = nth * PART + column
        there = at < DIM
        gain = 1.0 + tl.load(weight + at, mask=there, other=0.0).to(tl.float32)
        tl.store(normed + row * DIM + at, round_once(kept[nth] * inverse * gain, "float", TYPE, PORTABLE), mask=there)
