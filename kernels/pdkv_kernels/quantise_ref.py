"""Float32 to fp8: scaled explicitly, rounded to nearest even, saturated; and the scale of a token and head.

Every store of fp8 goes through here, so that an implicit conversion (which may truncate, wrap or give NaN, by device
and by version) never decides what is in the cache.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

_SIGN = 0x80
_FLOAT32_MANTISSA_BITS = 23
_FLOAT32_BIAS = 127
_FLOAT32_INFINITY = 0x7F800000
_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Fp8Format:
    """One way to read eight bits as a number. A dynamic scale divides the largest magnitude by ``max``."""

    name: str
    mantissa_bits: int
    bias: int
    max: float
    max_bits: int
    nan: int
    """Bits of NaN without its sign."""
    signed_zero: bool = True
    """Whether -0 exists; where it does not, its bits are the one NaN."""


E4M3FN = Fp8Format("e4m3fn", mantissa_bits=3, bias=7, max=448.0, max_bits=0x7E, nan=0x7F)
E4M3FNUZ = Fp8Format("e4m3fnuz", mantissa_bits=3, bias=8, max=240.0, max_bits=0x7F, nan=0x80, signed_zero=False)
E5M2 = Fp8Format("e5m2", mantissa_bits=2, bias=15, max=57344.0, max_bits=0x7B, nan=0x7F)

FORMATS = {torch.float8_e4m3fn: E4M3FN, torch.float8_e4m3fnuz: E4M3FNUZ, torch.float8_e5m2: E5M2}
"""By the dtype that torch gives them. The same bits mean half as much in e4m3fnuz as in e4m3fn."""


def quantise_ref(values: Tensor, dtype: torch.dtype, scale: Tensor | None = None) -> Tensor:
    """``values`` (divided by ``scale`` in float32, where given) in ``dtype``, rounded once, to nearest even.

    values: float [..., dim]; scale: float32 [...]. fp8 saturates: what exceeds the largest number, infinity included,
    becomes it, in e5m2 too, which could hold infinity. NaN stays NaN and keeps its sign (e4m3fnuz has but one NaN).
    Floats are cast as torch casts them.
    """
    wide = values.float()
    if scale is not None:
        wide = wide / scale[..., None]
    if dtype not in FORMATS:
        return wide.to(dtype)
    limit = FORMATS[dtype].max
    return wide.clamp(-limit, limit).to(dtype)


def token_scale_ref(values: Tensor, dtype: torch.dtype) -> Tensor:
    """By what to divide each vector so that its largest magnitude becomes the largest number of ``dtype``.

    values: float [..., dim]; returns float32 [...], the largest magnitude / ``max`` by one IEEE division. A vector of
    zeros has scale 1, as has one so small that the scale would be subnormal (some devices flush it to 0): it is stored
    as zeros. A vector that holds NaN or infinity has scale NaN, so that all of it reads as NaN and none as a number.
    """
    bits = values.float().view(torch.int32) & 0x7FFFFFFF  # magnitudes compare as their bits do, NaN above infinity
    largest = bits.amax(dim=-1)
    scale = largest.view(torch.float32) / FORMATS[dtype].max
    scale = torch.where(scale < _SMALLEST_NORMAL, 1.0, scale)
    return torch.where(largest >= _FLOAT32_INFINITY, torch.nan, scale)


def fp8_bits_ref(values: Tensor, form: Fp8Format) -> Tensor:
    """The bits of ``quantise_ref`` without a scale, by integer arithmetic alone: uint8, of the shape of ``values``.

    For devices and interpreters whose own conversion cannot be trusted. values: float32 [...].
    """
    bits = values.view(torch.int32).long() & 0xFFFFFFFF
    sign = (bits >> 24) & _SIGN
    magnitude = bits & 0x7FFFFFFF
    exponent = (magnitude >> _FLOAT32_MANTISSA_BITS) - _FLOAT32_BIAS
    mantissa = (magnitude & 0x7FFFFF) | 0x800000  # a subnormal float32 is far below half of the smallest fp8
    smallest_exponent = 1 - form.bias
    # Below the smallest normal exponent the step between two numbers stays what it is there.
    below = (smallest_exponent - exponent).clamp(min=0)
    shift = (_FLOAT32_MANTISSA_BITS - form.mantissa_bits + below).clamp(max=30)
    odd = (mantissa >> shift) & 1
    rounded = (mantissa + (1 << (shift - 1)) - 1 + odd) >> shift  # half a step, less one unit where that ties to even
    # A carry out of the mantissa lands in the exponent, where it belongs; a normal number's leading 1 counts as one.
    biased = (exponent - smallest_exponent).clamp(min=0)
    number = (biased << form.mantissa_bits) + rounded
    number = number.clamp(max=form.max_bits)
    number = torch.where(magnitude > _FLOAT32_INFINITY, form.nan, number)
    if form.signed_zero:
        return (number | sign).to(torch.uint8)
    return torch.where(number == 0, 0, number | sign).to(torch.uint8)
