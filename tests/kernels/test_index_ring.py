"""The scan by a ring of tiles: what it takes, and that its keys and choices are those of the other scan."""

from dataclasses import replace

import pdkv_kernels.index_ring as index_ring_module
import pdkv_kernels.index_scan as index_scan_module
import pdkv_kernels.index_topk_decode as index_topk_decode_module
import pytest
import torch
from pdkv_kernels.index_ring import RING_TILES, programs_that_fit, ring_fits
from pdkv_kernels.index_scan import ScanPlan
from pdkv_kernels.index_topk_decode import SelectionRule, scan_plan
from pdkv_kernels.paged import BLOCK

from tests.kernels.decode_case import make_decode
from tests.kernels.test_index_topk_decode_triton import check, choice_and_keys, on_hopper, told_settled

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
RULE = SelectionRule(16, 1, 1)
LENGTHS = [40 * BLOCK + 1, 0, 23 * BLOCK + 2, 9 * BLOCK, 9 * BLOCK + 1, 3, 130 * BLOCK + 77]


def test_what_a_ring_takes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(index_ring_module, "chained", lambda: True)
    case = told_settled(make_decode("cpu", BF16, [300, 2048], query_len=2, heads=(2, 2), dim=128))
    q, k, batch = case.index_q.to(BF16), case.index_k, case.batch
    assert ring_fits(q, k, batch)
    assert ring_fits(q[:, :1], k, batch)
    assert not ring_fits(q, k, replace(batch, settled=False)), "no promise"
    assert not ring_fits(q.repeat(1, 2, 1), k, batch), "eight columns"
    assert not ring_fits(q, k.to(E4M3), batch), "two dtypes"
    assert not ring_fits(q.float(), k.float(), batch)
    assert not ring_fits(q[..., :64], k[..., :64], batch), "half of each line"
    wide = torch.zeros(4, BLOCK * 128 + 64, dtype=BF16)
    assert not ring_fits(q, wide.as_strided((4, BLOCK, 128), (BLOCK * 128 + 64, 128, 1)), batch), "half a line too far"
    many = torch.empty_strided((1 << 25, BLOCK, 128), k.stride(), dtype=BF16, device="meta")
    assert not ring_fits(q, many, batch), "more lines than can be counted"
    assert ring_fits(q, many[: 1 << 20], batch)
    monkeypatch.setattr(index_ring_module, "chained", lambda: False)
    assert not ring_fits(q, k, batch), "launches do not overlap"


@on_hopper
@pytest.mark.parametrize("dtype", [BF16, E4M3, E5M2])
@pytest.mark.parametrize(("heads", "query_len"), [(1, 1), (4, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("splits", [1, 3, 7, 48])
@pytest.mark.parametrize("most_without_groups", [8, 1024])
def test_keys_and_choices_are_the_other_scans(
    dtype: torch.dtype,
    heads: int,
    query_len: int,
    splits: int,
    most_without_groups: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(index_scan_module, "MOST_WITHOUT_GROUPS", most_without_groups)
    monkeypatch.setattr(index_topk_decode_module, "MOST_WITHOUT_GROUPS", most_without_groups)
    case = told_settled(make_decode("cuda", dtype, LENGTHS, query_len=query_len, heads=(heads, heads), dim=128))
    case.index_k[case.batch.page_table[0, 17].long(), 5] = torch.full((128,), torch.nan, device="cuda").to(dtype)
    torch.cuda.synchronize()
    ring = ScanPlan(splits, 4, RING_TILES + 1, ring=True)
    check(case, RULE, tolerance=2e-3, plan=ring)
    out, keys = choice_and_keys(case, RULE, plan=ring)
    other, other_keys = choice_and_keys(case, RULE, plan=ScanPlan(splits, 4, 3, in_advance=False))
    assert torch.equal(out, other)
    assert torch.equal(keys, other_keys)


@on_hopper
@pytest.mark.parametrize(("dtype", "programs"), [(BF16, 2), (E4M3, 4)])
def test_plans_have_rings_that_fill_more_than_once(dtype: torch.dtype, programs: int):
    long, short = (
        told_settled(make_decode("cuda", dtype, [n] * 8, heads=(4, 4), dim=128)) for n in (64 * 1024, 4 * 1024)
    )
    plan = scan_plan(long.batch, long.index_q, long.index_k, scan_follows=True)
    assert (plan.ring, programs_that_fit(long.index_k)) == (True, programs)
    assert not scan_plan(short.batch, short.index_q, short.index_k, scan_follows=True).ring
