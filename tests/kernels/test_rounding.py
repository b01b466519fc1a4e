"""Division by a token's scale, in the way that each kind of device takes, against IEEE's."""

import pytest
import torch
import triton
import triton.language as tl
from pdkv_kernels.rounding import divided

from tests.kernels.decode_case import HAS_CUDA

DEVICE = "cuda" if HAS_CUDA else "cpu"


@triton.jit
def _divide(x, scale, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PORTABLE: tl.constexpr):
    row = tl.arange(0, ROWS)
    at = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    quotients = divided((tl.load(x + at),), tl.load(scale + row), 1, PORTABLE)
    tl.store(out + at, quotients[0])


@pytest.mark.parametrize("is_portable", [True, False])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_zeros_keep_their_sign_and_a_damaged_vector_is_nan_throughout(is_portable: bool):
    x = torch.tensor([0.0, -0.0, 448.0, -7.0]).repeat(4, 1)
    x[1] *= 2.0**-70
    scale = torch.tensor([0.5, 2.0**-70, 1.0, torch.nan])
    out = torch.empty_like(x, device=DEVICE)
    _divide[(1,)](x.to(DEVICE), scale.to(DEVICE), out, ROWS=4, COLUMNS=4, PORTABLE=is_portable)
    expected = x / scale[:, None]
    assert expected[3].isnan().all()
    assert out.cpu().nan_to_num(1e9).view(torch.int32).tolist() == expected.nan_to_num(1e9).view(torch.int32).tolist()
