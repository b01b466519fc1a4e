"""Norm, activation and router in one launch each, against the references on the CPU."""

import pytest
import torch
from pdkv_kernels.rms_norm import add_rms_norm, rms_norm
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.router_topk import router_topk
from pdkv_kernels.router_topk_ref import router_topk_ref
from pdkv_kernels.swigluoai import swigluoai
from pdkv_kernels.swigluoai_ref import swigluoai_ref

from tests.kernels.decode_case import on

ACTIVATION = (1.702, 7.0, 1.0)
KINDS = [on(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.float32, torch.bfloat16, torch.float16)]
# Infinities and NaN are meant; numpy, which the interpreter computes with, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def rows(device: str, dtype: torch.dtype, dim: int) -> torch.Tensor:
    """Rows of wildly different magnitude, one of zeros, one with infinity, one with NaN; part of a wider matrix."""
    num_rows = 7 if device == "cpu" else 1009
    x = torch.randn(num_rows, dim + 3) * torch.exp2(torch.randint(-12, 8, (num_rows, 1)).float())
    x[1], x[2, 3], x[3, 0] = 0.0, torch.inf, torch.nan
    return x.to(dtype)[:, 2 : 2 + dim]


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("dim", [24, 6144])
def test_norm_equals_the_reference_bit_for_bit(device: str, dtype: torch.dtype, dim: int):
    x, more, weight = rows(device, dtype, dim), rows(device, dtype, dim).flip(0), torch.randn(dim)
    normed = rms_norm(x.to(device), weight.to(device), 1e-6).cpu()
    torch.testing.assert_close(normed, rms_norm_ref(x, weight, 1e-6).to(dtype), rtol=0, atol=0, equal_nan=True)
    total, normed = (part.cpu() for part in add_rms_norm(x.to(device), more.to(device), weight.to(device), 1e-6))
    torch.testing.assert_close(total, x + more, rtol=0, atol=0, equal_nan=True)
    expected = rms_norm_ref(x + more, weight, 1e-6).to(dtype)
    torch.testing.assert_close(normed, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("size", [5, 1536])
def test_activation_is_rounded_once(device: str, dtype: torch.dtype, size: int):
    gate_up = rows(device, dtype, 2 * size)
    got = swigluoai(gate_up.to(device), *ACTIVATION).cpu()
    assert got.dtype == dtype
    # Half a unit in the last place more than the float32 result may be off by.
    near = {torch.float32: 4e-6, torch.bfloat16: 2**-8 + 4e-6, torch.float16: 2**-11 + 4e-6}[dtype]
    expected = swigluoai_ref(gate_up, *ACTIVATION)
    torch.testing.assert_close(got.float(), expected, rtol=near, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", torch.float32), *KINDS[3:]])
@pytest.mark.parametrize("num_rows", [1, 9, 6200])
def test_router_chooses_as_the_reference_but_for_near_ties(device: str, dtype: torch.dtype, num_rows: int):
    hidden, experts, k = (32, 11, 3) if device == "cpu" else (6144, 128, 4)
    x, weight = torch.randn(min(num_rows, 64 if device == "cpu" else num_rows), hidden), torch.randn(experts, hidden)
    x, weight, bias = x.to(dtype), weight / hidden**0.5, torch.randn(experts) * 0.1
    ids, shares = (part.cpu() for part in router_topk(x.to(device), weight.to(device), bias.to(device), k, 2.0))
    expected_ids, expected_shares = router_topk_ref(x, weight, bias, k, 2.0)
    assert ids.dtype == torch.int64
    same = (ids == expected_ids).all(dim=1)
    assert same.float().mean() >= (1.0 if num_rows < 10 else 0.998)
    torch.testing.assert_close(shares[same], expected_shares[same], rtol=2e-5, atol=0)
    # Where they differ, the scores that decided are as good as equal.
    scores = (x.double() @ weight.double().T).sigmoid() + bias
    torch.testing.assert_close(scores.gather(1, ids), scores.gather(1, expected_ids), rtol=0, atol=2e-6)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=KINDS[3].marks)])
@pytest.mark.parametrize("num_rows", [2, 6144])
def test_router_gives_equal_scores_to_the_lower_expert_and_minds_the_bias(device: str, num_rows: int):
    if device == "cpu" and (torch.cuda.is_available() or num_rows > 2):
        pytest.skip("the interpreter has shown it with two rows, or is off")
    x, weight = torch.zeros(num_rows, 64, dtype=torch.bfloat16, device=device), torch.randn(4, 64, device=device)
    for bias, chosen in (([0.0] * 4, [0, 1, 2]), ([-0.0, 0.0, 5.0, -1.0], [2, 0, 1])):
        ids, shares = router_topk(x, weight, torch.tensor(bias, device=device), 3, 1.0)
        assert (ids.cpu() == torch.tensor(chosen)).all()
        torch.testing.assert_close(shares.cpu(), torch.full((num_rows, 3), 1 / 3))
