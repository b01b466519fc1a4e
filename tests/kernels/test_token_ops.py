"""Operations on one token alone: norm, rope, activation, router, experts."""

import math

import pytest
import torch
from pdkv_kernels.moe_ref import moe_ref
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from pdkv_kernels.rope_ref import rope_ref, rope_table_ref
from pdkv_kernels.router_topk_ref import router_topk_ref
from pdkv_kernels.swigluoai_ref import swigluoai_ref

ACTIVATION = (1.702, 7.0, 1.0)


def test_norm_has_a_gain_of_one_plus_weight_and_keeps_zero():
    x, weight = torch.randn(3, 5, 24), torch.randn(24)
    y = rms_norm_ref(x.bfloat16(), weight, 1e-6)
    wide = x.bfloat16().double()
    expected = wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, atol=1e-5, rtol=1e-5)
    assert (rms_norm_ref(torch.zeros(2, 24), weight, 1e-6) == 0).all()


@pytest.mark.parametrize(("dim", "rotary"), [(128, 64), (32, 16), (16, 16), (8, 2)])
def test_rope_turns_pairs_half_a_rotation_apart_and_passes_the_rest(dim: int, rotary: int):
    x, positions = torch.randn(4, 3, dim), torch.tensor([0, 1, 777, 1_048_575])
    y = rope_ref(x, *rope_table_ref(positions, rotary, 5e6))
    half = rotary // 2
    for row, position in enumerate(positions.tolist()):
        for i in range(half):
            # The angle is rounded to float32 by definition, as is the frequency.
            frequency = torch.tensor(1.0) / torch.tensor(5e6) ** (torch.tensor(2.0 * i) / rotary)
            angle = float(torch.tensor(float(position)) * frequency)
            a, b = x[row, :, i], x[row, :, half + i]
            c, s = math.cos(angle), math.sin(angle)
            torch.testing.assert_close(y[row, :, i], a * c - b * s, atol=1e-5, rtol=0)
            torch.testing.assert_close(y[row, :, half + i], b * c + a * s, atol=1e-5, rtol=0)
    assert torch.equal(y[..., rotary:], x[..., rotary:])
    assert torch.equal(y[0], x[0])


def test_activation_clamps_the_gate_above_only():
    gate, up = [-20.0, -1.0, 3.0, 50.0], [0.5, -9.0, 30.0, -1.0]
    got = swigluoai_ref(torch.tensor(gate + up), *ACTIVATION)
    for g, u, y in zip(gate, up, got.tolist(), strict=True):
        gated = min(g, 7.0) / (1 + math.exp(-1.702 * min(g, 7.0)))
        assert y == pytest.approx(gated * (max(-7.0, min(u, 7.0)) + 1), rel=1e-5, abs=1e-9)


def test_router_chooses_by_bias_but_weighs_without_it():
    x, weight = torch.randn(50, 12), torch.randn(6, 12)
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0, -5.0, 0.0])
    ids, shares = router_topk_ref(x, weight, bias, 3, 2.0)
    scores = torch.sigmoid(x @ weight.T)
    assert (ids[:, 0] == 2).all()
    assert (ids != 4).all()
    expected = scores.gather(1, ids)
    torch.testing.assert_close(shares, 2.0 * expected / expected.sum(1, keepdim=True))


def test_router_gives_equal_scores_to_the_lower_expert():
    ids, shares = router_topk_ref(torch.zeros(2, 4), torch.randn(8, 4), torch.zeros(8), 3, 1.0)
    assert ids.tolist() == [[0, 1, 2]] * 2
    torch.testing.assert_close(shares, torch.full((2, 3), 1 / 3))


def test_experts_sum_what_their_rows_weigh_and_nobody_else_runs():
    x, ids = torch.randn(7, 6), torch.tensor([[0, 3], [3, 0], [1, 0], [3, 1], [0, 1], [1, 3], [0, 3]])
    weights, gate_up, down = torch.rand(7, 2), torch.randn(4, 10, 6), torch.randn(4, 6, 5)
    gate_up[2] = torch.nan  # chosen by no row
    out = moe_ref(x, ids, weights, gate_up, down, ACTIVATION)
    for row in range(7):
        expected = torch.zeros(6)
        for expert, weight in zip(ids[row].tolist(), weights[row], strict=True):
            expected += weight * (down[expert] @ swigluoai_ref(gate_up[expert] @ x[row], *ACTIVATION))
        torch.testing.assert_close(out[row], expected, atol=1e-4, rtol=1e-4)
