"""Attention and selection over fp8 state: equal to float64 over what the bytes mean, near what was to be stored.

Bounds. Against float64 over the dequantised state only float32 sums differ: 3e-5, as for float pages. Against the state
before quantisation an element of e4m3 is off by at most 2^-4 of itself (of its token's largest, below the normal ones),
so V moves the output by at most 2^-4 of the largest |V|, and K moves a logit by at most 2^-4 |q||k| / sqrt(dim).
"""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.index_topk_ref import index_topk_ref
from pdkv_kernels.paged import PagedKv
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.sparse_attention_ref import sparse_attention_ref

from tests.kernels.fp8_case import make_fp8_case
from tests.kernels.paged_case import MIXED, PagedCase, make_case, plain_attention, plain_scores

SCALE = 16**-0.5
FLOAT32_BOUND = 3e-5
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
KINDS = [(E4M3, True), (E5M2, True), (E4M3, False), (E5M2, False)]


def attend(case: PagedCase, kv: PagedKv, blocks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense without blocks."""
    if blocks is None:
        return paged_attention_ref(case.q, kv, case.queries, SCALE)
    return sparse_attention_ref(case.q, kv, blocks, case.queries, SCALE)


def select(case: PagedCase) -> torch.Tensor:
    return index_topk_ref(case.index_q, case.index_k, case.queries, 3, 0, 1)


def expected(case: PagedCase, blocks: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 over case.k and case.v, one row at a time: [num_rows, heads, dim], [num_rows, heads]."""
    outs, sums = [], []
    for row, seq, position in case.rows():
        visible = torch.ones(case.kv.k.shape[1], position + 1, dtype=torch.bool)
        if blocks is not None:
            chosen = torch.arange(position + 1) // 128
            visible = (chosen[None, :, None] == blocks[row][:, None, :]).any(dim=-1)
        out, total = plain_attention(case, row, seq, position, visible, SCALE)
        outs.append(out)
        sums.append(total)
    return torch.stack(outs), torch.stack(sums)


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize(("dtype", "scaled"), KINDS, ids=str)
def test_equals_float64_over_what_the_bytes_mean(dtype: torch.dtype, scaled: bool, sparse: bool):
    made = make_fp8_case(MIXED, dtype, scaled=scaled)
    blocks = select(made.case) if sparse else None
    for got, want in zip(attend(made.case, made.case.kv, blocks), expected(made.case, blocks), strict=True):
        torch.testing.assert_close(got.double(), want, atol=FLOAT32_BOUND, rtol=0)


@pytest.mark.parametrize(("dtype", "scaled"), KINDS, ids=str)
def test_stays_within_half_a_step_of_the_state_before_quantisation(dtype: torch.dtype, scaled: bool):
    """Logits moved by at most d make weights wrong by a factor of at most e^2d."""
    made = make_fp8_case([(300, 5), (0, 140)], dtype, scaled=scaled)
    before = replace(made.case, k=made.exact_k, v=made.exact_v)
    out, _ = attend(made.case, made.case.kv, None)
    want, _ = expected(before, None)
    step = torch.finfo(dtype).eps / 2
    for row, seq, position in made.case.rows():
        q = made.case.q[row].norm(dim=-1)  # [heads]
        k = made.exact_k[seq][:, : position + 1].norm(dim=-1).amax(dim=-1).repeat_interleave(2)
        v = made.exact_v[seq][:, : position + 1].abs().amax(dim=(1, 2)).repeat_interleave(2)
        moved = step * q * k * SCALE
        bound = v * (step + torch.expm1(2 * moved))
        assert ((out[row] - want[row]).abs().amax(dim=-1) <= bound * 1.01).all()


@pytest.mark.parametrize(
    ("dtype", "scaled", "most"),
    [(E4M3, True, 0.05), (E5M2, True, 0.1), (E4M3, False, 0.1), (E5M2, False, 0.2)],
    ids=str,
)
def test_fp8_stays_near_the_state_before_quantisation_in_numbers(dtype: torch.dtype, scaled: bool, most: float):
    """Root mean square, relative. Without the spread of magnitudes logits are larger, and so is what moves them."""
    made = make_fp8_case([(300, 40)], dtype, scaled=scaled)
    out, _ = attend(made.case, made.case.kv, None)
    want, _ = expected(replace(made.case, k=made.exact_k, v=made.exact_v), None)
    off = float((out - want).square().mean().sqrt() / want.square().mean().sqrt())
    print(f"off by {off:.3f}")  # noqa: T201
    assert most / 2.5 < off < most


def wrong_scales(kv: PagedKv, way: str) -> PagedKv:
    """The same pages with scales that are lost, shifted or mixed up, K's or V's."""
    name, how = way.split(": ")
    scale = kv.k_scale if name == "k" else kv.v_scale
    if how == "unit":
        wrong = torch.where(scale.isnan(), scale, 1.0)
    elif how == "of the next token":
        wrong = scale.roll(1, dims=2)
    elif how == "of the next head":
        wrong = scale.roll(1, dims=1)
    elif how == "of the next page":
        wrong = scale.roll(1, dims=0)
    elif how == "rows for columns":
        wrong = scale.transpose(1, 2).reshape(scale.shape)
    else:
        wrong = kv.v_scale if name == "k" else kv.k_scale
    # Scales that belong to no token would give themselves away as NaN.
    return replace(kv, **{f"{name}_scale": wrong.nan_to_num(1.0)})


WAYS = ("unit", "of the next token", "of the next head", "of the next page", "rows for columns", "of the other one")


@pytest.mark.parametrize("sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("way", [f"{name}: {way}" for name in "kv" for way in WAYS])
def test_scales_that_are_not_the_tokens_own_show(way: str, sparse: bool):
    made = make_fp8_case([(500, 3), (129, 1)])
    blocks = select(made.case) if sparse else None
    right, _ = expected(made.case, blocks)
    out, _ = attend(made.case, wrong_scales(made.case.kv, way), blocks)
    assert float((out - right).abs().amax()) > 1000 * FLOAT32_BOUND


def test_dropped_scales_show():
    made = make_fp8_case([(500, 3)])
    kv = made.case.kv
    right, _ = expected(made.case, None)
    for dropped in (replace(kv, k_scale=None), replace(kv, v_scale=None)):
        out, _ = attend(made.case, dropped, None)
        assert float((out - right).abs().amax()) > 1000 * FLOAT32_BOUND


@pytest.mark.parametrize("init", [0, 1])
def test_selection_over_fp8_index_keys_is_that_of_what_the_bytes_mean(init: int):
    """index_q is fp8 too. Products of e4m3 are exact in float32 and sums nearly so: only near ties may differ."""
    made = make_fp8_case(MIXED, seed=4)
    chosen = index_topk_ref(made.case.index_q, made.case.index_k, made.case.queries, 3, init, 1)
    num_decided = 0
    for row, seq, position in made.case.rows():
        scores = plain_scores(made.case, row, seq, position)
        num_blocks = scores.shape[1]
        scores[:, :init] = torch.inf
        scores[:, num_blocks - 1 :] = torch.inf
        order = scores.sort(dim=-1, descending=True)
        for head in range(4):
            count = min(3, num_blocks)
            values = order.values[head]
            if num_blocks > count and values[count - 1] - values[count] < 1e-4:
                continue
            num_decided += 1
            assert set(chosen[row, head, :count].tolist()) == set(order.indices[head, :count].tolist())
            assert (chosen[row, head, count:] == -1).all()
    assert num_decided > 0.95 * 4 * len(made.case.rows())


def test_a_selection_over_floats_differs_so_both_sides_must_cast():
    """Queries too: left in float they choose other blocks from the very same fp8 keys."""
    lengths = [(4000, 64)]
    floats, stored = make_case(lengths, seed=5), make_fp8_case(lengths, seed=5).case
    chosen = select(stored)
    assert (chosen != select(floats)).any()
    assert (chosen != select(replace(stored, index_q=floats.index_q))).any()
    assert torch.equal(chosen, select(replace(stored, index_q=stored.index_q.float())))
