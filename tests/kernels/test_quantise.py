"""Rounding to fp8: bit-exact with torch wherever torch is in range, saturating beyond, by two independent ways."""

import struct
from fractions import Fraction

import pytest
import torch
from pdkv_kernels.quantise_ref import (
    E4M3FN,
    E4M3FNUZ,
    E5M2,
    FORMATS,
    Fp8Format,
    fp8_bits_ref,
    quantise_ref,
    token_scale_ref,
)

DTYPES = list(FORMATS)
MAX_BITS = {torch.float8_e4m3fn: 0x7E, torch.float8_e4m3fnuz: 0x7F, torch.float8_e5m2: 0x7B}


def bits(values: torch.Tensor) -> list[int]:
    return values.view(torch.uint8).tolist()


def numbers(dtype: torch.dtype) -> torch.Tensor:
    """Every finite number that is not negative, ascending: float32."""
    return torch.arange(MAX_BITS[dtype] + 1, dtype=torch.uint8).view(dtype).float()


def hard_values(dtype: torch.dtype) -> torch.Tensor:
    """Every number, every tie between two, and the float32 just below and above each: both signs."""
    exact = numbers(dtype)
    ties = (exact[1:] + exact[:-1]) / 2
    around = torch.cat((exact, ties))
    infinity = torch.tensor(torch.inf)
    around = torch.cat((around, around.nextafter(infinity), around.nextafter(-infinity)))
    return torch.cat((around, -around))


def plain(value: float, dtype: torch.dtype) -> int:
    """Nearest number, ties to even bits, in exact fractions: bits without the sign."""
    exact = [Fraction(number) for number in numbers(dtype).tolist()]
    at = Fraction(abs(value))
    return min(range(len(exact)), key=lambda i: (abs(exact[i] - at), i % 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hard_values_round_as_exact_fractions_say_and_as_torch_does(dtype: torch.dtype):
    values = hard_values(dtype)
    got = bits(quantise_ref(values, dtype))
    inside = values.abs() <= FORMATS[dtype].max
    torch_bits = bits(values.to(dtype))
    for value, mine, its, is_inside in zip(values.tolist(), got, torch_bits, inside.tolist(), strict=True):
        sign = 0x80 if struct.pack(">f", value)[0] & 0x80 else 0
        magnitude = plain(value, dtype)
        if dtype is torch.float8_e4m3fnuz and magnitude == 0:
            sign = 0  # there is no -0: its bits are NaN
        assert mine == magnitude | sign, value
        assert mine == its or not is_inside, value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_integer_arithmetic_gives_the_same_bits(dtype: torch.dtype):
    every_half = torch.arange(1 << 16, dtype=torch.int32) << 16  # every bfloat16 as float32, NaN and infinity too
    generator = torch.Generator().manual_seed(3)
    any_bits = torch.randint(-(1 << 31), 1 << 31, (400_000,), generator=generator).int()
    near = torch.randn(200_000, generator=generator) * FORMATS[dtype].max ** 0.5
    values = torch.cat((every_half.view(torch.float32), any_bits.view(torch.float32), near, hard_values(dtype)))
    assert torch.equal(fp8_bits_ref(values, FORMATS[dtype]), quantise_ref(values, dtype).view(torch.uint8))


@pytest.mark.parametrize(
    ("dtype", "most", "nan"),
    [(torch.float8_e4m3fn, 0x7E, 0x7F), (torch.float8_e5m2, 0x7B, 0x7F), (torch.float8_e4m3fnuz, 0x7F, 0x80)],
    ids=str,
)
def test_overflow_saturates_and_nan_stays(dtype: torch.dtype, most: int, nan: int):
    form = FORMATS[dtype]
    beyond = torch.tensor([form.max, form.max * 1.01, form.max * 1.2, 1e30, 3.4e38, torch.inf])
    assert bits(quantise_ref(beyond, dtype)) == [most] * 6
    assert bits(quantise_ref(-beyond, dtype)) == [most | 0x80] * 6
    assert [b & 0x7F | nan & 0x80 for b in bits(quantise_ref(torch.tensor([torch.nan, -torch.nan]), dtype))] == [
        nan
    ] * 2
    assert quantise_ref(torch.tensor([torch.nan]), dtype).float().isnan().all()


@pytest.mark.parametrize("form", [E4M3FN, E4M3FNUZ, E5M2], ids=lambda form: form.name)
def test_a_format_says_what_torch_says(form: Fp8Format):
    dtype = next(d for d, known in FORMATS.items() if known is form)
    info = torch.finfo(dtype)
    assert form.max == info.max
    assert torch.tensor([form.max_bits], dtype=torch.uint8).view(dtype).float().item() == form.max
    assert torch.tensor([form.nan], dtype=torch.uint8).view(dtype).float().isnan().all()
    assert info.smallest_normal == 2.0 ** (1 - form.bias)
    assert info.eps == 2.0**-form.mantissa_bits
    assert torch.tensor([0x80], dtype=torch.uint8).view(dtype).float().isnan().item() != form.signed_zero


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_floats_are_cast_as_torch_casts(dtype: torch.dtype):
    values = torch.cat((torch.randn(1000) * 1e3, torch.tensor([1.00390625, 65519.0, 65520.0, 3.4e38, -0.0, 1e-8])))
    assert torch.equal(quantise_ref(values, dtype), values.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_scale_is_the_largest_magnitude_over_the_largest_number(dtype: torch.dtype):
    wild = torch.randn(50, 16) * torch.exp2(torch.randint(-60, 60, (50, 1)).float())
    scale = token_scale_ref(wild, dtype)
    for row, found in zip(wild, scale, strict=True):
        assert found == row.abs().max() / torch.finfo(dtype).max
    stored = quantise_ref(wild, dtype, scale)
    assert (stored.float().abs().amax(dim=-1) == FORMATS[dtype].max).all()
    back = stored.float() * scale[:, None]
    # Half a step of the mantissa for normal numbers, half of the smallest step below them.
    step = torch.maximum(wild.abs() * torch.finfo(dtype).eps / 2, scale[:, None] * torch.finfo(dtype).tiny / 4)
    assert ((back - wild).abs() <= step * (1 + 1e-6)).all()


def test_zeros_and_nearly_zeros_have_scale_one():
    tiny = torch.finfo(torch.float32).tiny
    rows = torch.zeros(5, 4)
    rows[1, 2], rows[2, 0], rows[3, 1], rows[4, 3] = -0.0, 1e-45, 447 * tiny, 448 * tiny
    scale = token_scale_ref(rows, torch.float8_e4m3fn)
    assert scale.tolist() == [1.0, 1.0, 1.0, 1.0, tiny]
    stored = quantise_ref(rows, torch.float8_e4m3fn, scale)
    assert (stored[:4].float() == 0).all()
    assert stored[4].float().tolist() == [0, 0, 0, 448]


@pytest.mark.parametrize("damage", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_a_damaged_vector_reads_as_nan_throughout_and_no_other_does(damage: float):
    rows = torch.randn(3, 8)
    rows[1, 5] = damage
    scale = token_scale_ref(rows, torch.float8_e4m3fn)
    back = quantise_ref(rows, torch.float8_e4m3fn, scale).float() * scale[:, None]
    assert back.isnan().any(dim=-1).tolist() == [False, True, False]
    assert back[1].isnan().all()


def test_the_largest_float32_keeps_its_sign_and_size():
    row = torch.tensor([[3.4028235e38, -3.4028235e38, 1.0]])
    scale = token_scale_ref(row, torch.float8_e4m3fn)
    back = quantise_ref(row, torch.float8_e4m3fn, scale).float() * scale[:, None]
    torch.testing.assert_close(back[:, :2], row[:, :2], rtol=1e-6, atol=0)
