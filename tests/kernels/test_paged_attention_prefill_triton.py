"""The prefill kernel of dense attention against the reference, outputs poisoned."""

import pytest
import torch
from pdkv_kernels.paged_attention_prefill import paged_attention_prefill
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.sparse_attention_prefill import PrefillTuning

from tests.kernels.decode_case import on
from tests.kernels.prefill_case import PrefillCase, make_prefill

CPU = on("cpu", torch.float32)
CUDA = [on("cuda", torch.bfloat16), on("cuda", torch.float8_e4m3fn)]
SOFT = [on("cpu", torch.float8_e4m3fn), on("cpu", torch.float8_e4m3fnuz), on("cpu", torch.float8_e5m2)]
HARD = [on("cuda", torch.float8_e4m3fnuz), on("cuda", torch.float8_e5m2)]

SMALL = PrefillTuning(tile_rows=32, tile_keys=64)
FEW = [(300, 5), (0, 1), (500, 0), (127, 1), (128, 1), (250, 20)]
LONG = [(0, 1), (0, 129), (127, 2), (2047, 3), (500, 0), (4095, 70), (9_000, 40)]
DIM = {"cpu": 16, "cuda": 128}


def check(case: PrefillCase) -> None:
    """bfloat16: relative error of the whole within 0.3 %; e4m3 with q in two parts within 0.8 %."""
    scale = case.q.shape[2] ** -0.5
    out = torch.full_like(case.q, torch.nan)
    lse = torch.full(case.q.shape[:2], torch.nan, dtype=torch.float32, device=case.q.device)
    tuning = SMALL if case.q.device.type == "cpu" else None
    paged_attention_prefill(case.q, case.kv, case.queries, scale, (out, lse), tuning)
    queries, kv = case.reference()
    expected, expected_lse = paged_attention_ref(case.q.cpu().float(), kv, queries, scale)
    if case.q.dtype == torch.float32:
        torch.testing.assert_close(out, expected, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=1e-5)
        return
    native = case.kv.k.dtype == torch.float8_e4m3fn
    error = (out.cpu().float() - expected).norm() / expected.norm()
    assert error < (0.008 if native else 0.003), f"relative error {error:.4f}"
    assert (lse.cpu() - expected_lse).abs().max() < (0.2 if native else 0.02)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
@pytest.mark.parametrize("heads", [(4, 2), (64, 4), (3, 3)], ids=str)
def test_equals_the_reference(device: str, dtype: torch.dtype, heads: tuple[int, int]):
    heads = (16, 1) if device == "cpu" and heads[0] == 64 else heads
    check(make_prefill(device, dtype, FEW if device == "cpu" else LONG, heads=heads, dim=DIM[device]))


@pytest.mark.parametrize(("device", "dtype"), [*SOFT, *CUDA, *HARD])
@pytest.mark.parametrize("scaled", [True, False], ids=["scaled", "unscaled"])
def test_every_format_with_and_without_scales(device: str, dtype: torch.dtype, scaled: bool):
    lengths = [(200, 9)] if device == "cpu" else LONG
    check(make_prefill(device, dtype, lengths, heads=(4, 2), dim=DIM[device], scaled=scaled))


def test_no_rows_at_all():
    case = make_prefill("cpu", torch.float32, [(100, 0)])
    out, lse = paged_attention_prefill(case.q, case.kv, case.queries, 1.0)
    assert out.shape == (0, 8, 16)
    assert lse.shape == (0, 8)
