"""8-bit floats inside Triton kernels, in whichever format, on whichever hardware.

Where the hardware has the format, Triton reads it as its own type. Where it has not (the fnuz formats on NVIDIA, any
before Ada), the bytes are read as integers, and a few integer operations make float16 of them, which holds every value
of every one of these formats exactly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.hardware import hardware

PLAIN = 0
"""Not an 8-bit float, or one that is multiplied as it is."""
CONVERT = 1
"""An 8-bit float that Triton itself converts to float16."""
BITS_E4M3 = 2
BITS_E4M3_FNUZ = 3
BITS_E5M2 = 4
BITS_E5M2_FNUZ = 5

_BITS = {
    torch.float8_e4m3fn: BITS_E4M3,
    torch.float8_e4m3fnuz: BITS_E4M3_FNUZ,
    torch.float8_e5m2: BITS_E5M2,
    torch.float8_e5m2fnuz: BITS_E5M2_FNUZ,
}


def fp8_code(data: Tensor, beside: torch.dtype | None = None) -> tuple[int, Tensor]:
    """How a kernel must read data, and what to hand to it: itself, or its bytes as uint8.

    ``beside`` is the dtype of the other operand of a product: two equal native formats are multiplied as they are.
    """
    if data.dtype not in _BITS:
        return PLAIN, data
    if not _native(data.dtype):
        return _BITS[data.dtype], data.view(torch.uint8)
    if beside == data.dtype:
        return PLAIN, data
    return CONVERT, data


def _native(dtype: torch.dtype) -> bool:
    """Whether the device's matrix units and conversions know the format."""
    return dtype in (torch.float8_e4m3fn, torch.float8_e5m2) and hardware().capability >= 89


def fp8_pairs(data: Tensor) -> tuple[int, Tensor]:
    """How a kernel may read two neighbours of the last dimension as one integer, and what to hand to it.

    Matrix units want a tile of V turned round, and the hardware turns two bytes at a time: so fp8 goes through as pairs
    of bytes and is widened afterwards (``half_of_pairs``). (PLAIN, data) where that cannot be done.
    """
    if fp8_code(data)[0] != CONVERT or data.storage_offset() % 2 or any(n % 2 for n in data.stride()[:-1]):
        return PLAIN, data
    return _BITS[data.dtype], data.view(torch.int16)


def _widening(first: int, kind: str) -> str:
    """PTX that makes two float16 of bytes ``first`` and ``first + 2`` of a register."""
    pick = f"prmt.b32 both, $1, 0, 0x44{first + 2}{first};"
    return (
        f"{{ .reg .b32 both; .reg .b16 low, high; {pick} mov.b32 {{low, high}}, both; cvt.rn.f16x2.{kind}x2 $0, low; }}"
    )


_EVEN_E4M3 = tl.constexpr(_widening(0, "e4m3"))
_ODD_E4M3 = tl.constexpr(_widening(1, "e4m3"))
_EVEN_E5M2 = tl.constexpr(_widening(0, "e5m2"))
_ODD_E5M2 = tl.constexpr(_widening(1, "e5m2"))


@triton.jit
def half_of_pairs(x, ODD: tl.constexpr, CODE: tl.constexpr):
    """The even or the odd ones of pairs of 8-bit floats as float16; CODE from ``fp8_pairs``, not PLAIN."""
    if CODE == 2:
        return _widened(x, _ODD_E4M3 if ODD else _EVEN_E4M3)
    else:
        return _widened(x, _ODD_E5M2 if ODD else _EVEN_E5M2)


@triton.jit
def _widened(x, ASM: tl.constexpr):
    return tl.inline_asm_elementwise(ASM, "=r,r", [x], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def half_of_bits(x, CODE: tl.constexpr):
    """Values as float16, exactly; with PLAIN the values as they are."""
    if CODE == 0:
        return x
    elif CODE == 1:
        return x.to(tl.float16)
    else:
        return _half(x.to(tl.int16), CODE)


@triton.jit
def _half(bits, CODE: tl.constexpr):
    sign = (bits & 0x80) << 8
    if CODE == 4:
        return (sign | ((bits & 0x7F) << 8)).to(tl.float16, bitcast=True)
    elif CODE == 5:
        scaled = (sign | ((bits & 0x7F) << 8)).to(tl.float16, bitcast=True)
        return tl.where(bits == 0x80, float("nan"), scaled * 0.5).to(tl.float16)
    else:
        # The same bits as float16 mean 2^-8 of the value (exponents are biased by 15, not 7), or 2^-7 for fnuz (8).
        scaled = (sign | ((bits & 0x7F) << 7)).to(tl.float16, bitcast=True)
        if CODE == 2:
            return tl.where((bits & 0x7F) == 0x7F, float("nan"), scaled * 256.0).to(tl.float16)
        else:
            return tl.where(bits == 0x80, float("nan"), scaled * 128.0).to(tl.float16)
