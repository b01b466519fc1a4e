"""Widen elements of pages inside a kernel: fp8 bytes of any format become floats exactly, on any device."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_NVIDIA_CONVERTS = (torch.float8_e4m3fn, torch.float8_e5m2)
_NAMES = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz", torch.float8_e5m2: "e5m2"}


def kernel_view(pages: Tensor) -> tuple[Tensor, str, bool]:
    """What to hand to a kernel in place of ``pages``, the format to widen it from, and whether natively.

    Formats that the device does not convert by itself go as their bytes.
    """
    form = _NAMES.get(pages.dtype)
    if form is None:
        return pages, "plain", False
    native = pages.is_cuda and torch.version.hip is None and pages.dtype in _NVIDIA_CONVERTS
    return (pages if native else pages.view(torch.uint8)), form, native


@triton.jit
def widen(x, FORMAT: tl.constexpr, DTYPE: tl.constexpr, NATIVE: tl.constexpr):
    """Elements of pages in DTYPE, which must hold them exactly. NATIVE: x is of the format's own type."""
    if FORMAT == "plain" or NATIVE:
        return x.to(DTYPE)
    else:
        return _widen_bits(x, FORMAT).to(DTYPE)


@triton.jit
def _widen_bits(x, FORMAT: tl.constexpr):
    """float16: exponent and mantissa move into float16's places, and a product mends the exponent's bias."""
    bits = x.to(tl.int16)
    sign = (bits & 0x80) << 8
    if FORMAT == "e5m2":
        return (bits << 8).to(tl.float16, bitcast=True)
    else:
        number = (sign | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        if FORMAT == "e4m3fn":
            return tl.where((bits & 0x7F) == 0x7F, float("nan"), number * 256.0).to(tl.float16)
        else:
            return tl.where((bits & 0xFF) == 0x80, float("nan"), number * 128.0).to(tl.float16)
