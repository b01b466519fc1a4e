"""Round float32 once inside a kernel, as ``quantise_ref`` does: to nearest even, fp8 saturated, on any device.

Only NVIDIA's conversion from Ada on is trusted, which rounds and saturates so by instruction, and is tested bit by bit
but for the sign of NaN. Elsewhere fp8 is made by integer arithmetic, so that no device's conversion decides what is in
the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.hardware import hardware

FORMATS = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz", torch.float8_e5m2: "e5m2"}
MAX = {"e4m3fn": 448.0, "e4m3fnuz": 240.0, "e5m2": 57344.0, "float": 1.0}


def store_view(pages: Tensor) -> tuple[Tensor, str]:
    """What a kernel stores into in place of ``pages``, and the format to round to; fp8 is stored as bytes."""
    form = FORMATS.get(pages.dtype)
    return (pages, "float") if form is None else (pages.view(torch.uint8), form)


def portable() -> bool:
    """Whether kernels must round by integer arithmetic."""
    return hardware().capability < 89


@triton.jit
def round_once(x, FORMAT: tl.constexpr, TYPE: tl.constexpr, PORTABLE: tl.constexpr):
    """float32 x in TYPE, or as bytes of FORMAT. PORTABLE: see ``portable``."""
    if FORMAT == "float":
        return _bfloat16(x) if PORTABLE and TYPE == tl.bfloat16 else x.to(TYPE)  # noqa: SIM300
    elif FORMAT == "e4m3fnuz":
        return _fp8(x, 3, 8, 0x7F, 0x80, False)
    elif FORMAT == "e4m3fn":
        return _fp8(x, 3, 7, 0x7E, 0x7F, True) if PORTABLE else x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        return _fp8(x, 2, 15, 0x7B, 0x7F, True) if PORTABLE else x.to(tl.float8e5).to(tl.uint8, bitcast=True)


@triton.jit
def divided(parts, scale, PARTS: tl.constexpr, PORTABLE: tl.constexpr):
    """Each of the tensors [rows, columns] over scale [rows], as IEEE divides, where the scale is as ``token_scale``.

    With the reciprocal at hand, two corrections of a quotient by its exact remainder round it as the division would;
    they must not underflow, so tiny vectors and their scales are multiplied by a power of two first.
    """
    quotients: tl.tuple = ()
    if PORTABLE:
        for nth in tl.static_range(PARTS):
            quotients = quotients + (tl.div_rn(parts[nth], tl.broadcast_to(scale[:, None], parts[nth].shape)),)
    else:
        lift = tl.where(scale < 1e-18, 18446744073709551616.0, 1.0)  # 2^64
        divisor = scale * lift
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), divisor)
        divisor, inverse, lift = -divisor[:, None], inverse[:, None], lift[:, None]
        whole = (scale == 1.0)[:, None]
        zero = tl.where(scale == scale, 0.0, float("nan"))[:, None]  # nothing is zero over NaN
        for nth in tl.static_range(PARTS):
            x = parts[nth] * lift
            quotient = x * inverse
            quotient = tl.fma(tl.fma(quotient, divisor, x), inverse, quotient)
            quotient = tl.fma(tl.fma(quotient, divisor, x), inverse, quotient)
            # Corrections would lose the sign of zero, and infinity.
            quotients = quotients + (tl.where(whole | (x == zero), x, quotient),)
    return quotients


@triton.jit
def token_scale(x, valid, FORMAT: tl.constexpr, LARGEST: tl.constexpr):
    """Scale of each row of |x| bits, as ``token_scale_ref`` has it. x: int32 bits of the largest magnitude [rows]."""
    scale = tl.div_rn(x.to(tl.float32, bitcast=True), tl.full(x.shape, LARGEST, tl.float32))
    scale = tl.where(x < 0x7F800000, tl.where(scale < 1.1754943508222875e-38, 1.0, scale), float("nan"))
    return tl.where(valid, scale, 1.0)


@triton.jit
def magnitude_bits(x):
    """Bits of |x|, which compare as magnitudes do, NaN above infinity."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _bfloat16(x):
    bits = x.to(tl.int32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    rounded = tl.where((bits & 0x7FFFFFFF) > 0x7F800000, (bits >> 16) | 0x40, rounded)
    return rounded.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def _fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, MOST: tl.constexpr, NAN: tl.constexpr, SIGNED: tl.constexpr):
    """uint8; see ``fp8_bits_ref`` for the steps."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> 23) - 127
    mantissa = (magnitude & 0x7FFFFF) | 0x800000
    least: tl.constexpr = 1 - BIAS
    below = tl.maximum(least - exponent, 0)
    shift = tl.minimum(23 - MANTISSA + below, 30)
    rounded = (mantissa + (1 << (shift - 1)) - 1 + ((mantissa >> shift) & 1)) >> shift
    number = (tl.maximum(exponent - least, 0) << MANTISSA) + rounded
    number = tl.minimum(number, MOST)
    number = tl.where(magnitude > 0x7F800000, NAN, number)
    if SIGNED:
        number = number | sign
    else:
        number = tl.where(number == 0, 0, number | sign)
    return number.to(tl.uint8)
