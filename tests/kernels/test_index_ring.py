"""The scan by a ring of tiles: what it takes, and that its keys and choices are those of the other scan."""

from dataclasses import replace

import pdkv_kernels.index_ring as index_ring_module
import pdkv_kernels.index_scan as index_scan_module
import pdkv_kernels.index_topk_decode as index_topk_decode_module
import pytest
import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_ring import RingPlan, ring_fits
from pdkv_kernels.index_scan import ScanPlan
from pdkv_kernels.index_topk_decode import SelectionRule, scan_plan
from pdkv_kernels.paged import BLOCK

from tests.kernels.decode_case import make_decode
from tests.kernels.test_index_topk_decode_triton import check, choice_and_keys, on_hopper, told_settled

BF16, E4M3, E5M2 = torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2
RULE = SelectionRule(16, 1, 1)
OF_FOUR_WARPS = RingPlan(BLOCK, 3, 4, 4)
OF_FEWER = (RingPlan(64, 3, 2, 8), RingPlan(32, 3, 1, 16), RingPlan(32, 5, 1, 8, behind=2))
CASES = [
    *((OF_FOUR_WARPS, heads, query_len) for heads, query_len in ((1, 1), (4, 1), (3, 1), (1, 3), (2, 2))),
    *((ring, heads, query_len) for ring in OF_FEWER for heads, query_len in ((4, 1), (1, 3))),
]
"""Plans, heads and query rows."""
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
@pytest.mark.parametrize(("ring", "heads", "query_len"), CASES, ids=str)
@pytest.mark.parametrize("most_without_groups", [8, 1024])
def test_keys_and_choices_are_the_other_scans(
    dtype: torch.dtype,
    ring: RingPlan,
    heads: int,
    query_len: int,
    most_without_groups: int,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(index_scan_module, "MOST_WITHOUT_GROUPS", most_without_groups)
    monkeypatch.setattr(index_topk_decode_module, "MOST_WITHOUT_GROUPS", most_without_groups)
    case = told_settled(make_decode("cuda", dtype, LENGTHS, query_len=query_len, heads=(heads, heads), dim=128))
    case.index_k[case.batch.page_table[0, 17].long(), 5] = torch.full((128,), torch.nan, device="cuda").to(dtype)
    torch.cuda.synchronize()
    for splits in (1, 7, 131):
        plan = ScanPlan(splits, 4, 3, ring=ring)
        check(case, RULE, tolerance=2e-3, plan=plan)
        out, keys = choice_and_keys(case, RULE, plan=plan)
        other, other_keys = choice_and_keys(case, RULE, plan=ScanPlan(splits, 4, 3, in_advance=False))
        assert torch.equal(out, other), splits
        assert torch.equal(keys, other_keys), splits


@pytest.mark.parametrize(
    ("dtype", "seqs", "blocks", "follows", "splits", "expected"),
    [
        (E4M3, 8, 1024, True, 256, RingPlan(32, 3, 1, 16)),
        (E4M3, 8, 1024, False, 256, RingPlan(32, 3, 1, 16, behind=1)),
        (E4M3, 2, 1024, True, 1024, RingPlan(32, 3, 1, 16, behind=1)),
        (E4M3, 6, 1024, True, 342, RingPlan(32, 3, 1, 16)),
        (E4M3, 1, 32, True, 32, RingPlan(BLOCK, 3, 4, 4)),
        (E4M3, 1, 4096, True, 512, RingPlan(BLOCK, 3, 4, 4)),
        (E4M3, 64, 1024, True, 8, RingPlan(BLOCK, 3, 4, 4)),
        (E4M3, 64, 1024, False, None, None),
        (BF16, 8, 1024, True, 64, RingPlan(64, 3, 2, 4)),
        (BF16, 64, 64, True, 8, RingPlan(64, 3, 2, 4)),
        (BF16, 8, 1024, False, 32, RingPlan(BLOCK, 3, 4, 2)),
        (BF16, 1, 32, True, None, None),
    ],
)
def test_plans(
    dtype: torch.dtype,
    seqs: int,
    blocks: int,
    follows: bool,
    splits: int | None,
    expected: RingPlan | None,
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(index_ring_module, "chained", lambda: True)
    table = torch.zeros(seqs, blocks, dtype=torch.int32)
    batch = DecodeBatch(torch.full((seqs,), blocks * BLOCK, dtype=torch.int32), table, 1, settled=True)
    q, k = torch.zeros(seqs, 4, 128, dtype=dtype), torch.zeros(1, BLOCK, 128, dtype=dtype)
    plan = scan_plan(batch, q, k, scan_follows=follows)
    assert plan.ring == expected
    assert splits in (plan.splits, None)
