"""Attention to selected blocks by a ring of tiles: what it takes, who is given it, and that it is the reference's."""

from collections.abc import Callable
from dataclasses import replace

import pdkv_kernels.attend_ring as attend_ring_module
import pdkv_kernels.sparse_attention_decode as sparse_attention_decode_module
import pytest
import torch
from pdkv_kernels.attend_ring import RingPlan, ring_fits
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.hardware import Hardware
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.softmax_merge import MergeWorkspace
from pdkv_kernels.sparse_attention_decode import AttendPlan, attend_plan, sparse_attention_decode_into
from torch import Tensor

from tests.kernels.decode_case import DecodeCase, make_decode
from tests.kernels.test_sparse_attention_decode_triton import attend, check, pick

BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn
HAS_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
HOPPER = Hardware(90, False, 232_448)
REGISTERS = 65_536
LENGTHS = [1, 127, 128, 129, 0, 2047, 2048, 2049, 5000, 33, 700, 40]
RINGS = [(1, 32, 3), (1, 32, 4), (1, 32, 5), (1, 16, 6), (2, 32, 6), (2, 32, 12), (4, 64, 4), (4, 64, 6)]
"""Warps, tokens of a tile, slots: those that plans have, and neighbours."""


def on_hopper(test: Callable[..., None]) -> Callable[..., None]:
    return pytest.mark.gpu(pytest.mark.skipif(not HAS_HOPPER, reason="needs a Hopper GPU")(test))


def by_ring(warps: int, tile: int, slots: int, rounds: int) -> AttendPlan:
    return AttendPlan(1, tile, warps, 1, ring=RingPlan(warps, tile, slots, rounds))


def untidy(case: DecodeCase, topk: int) -> Tensor:
    """Choices for ``LENGTHS``, among them a row that chose nothing, holes in front, and blocks that cannot be seen."""
    blocks = pick(case, topk)
    blocks[1] = -1
    blocks[8], blocks[10] = blocks[8].flip(-1), blocks[10].flip(-1)
    blocks[7] = -1
    blocks[7, :, :6] = torch.tensor([17, 0, 16, 5, -1, 3], dtype=torch.int32)
    return blocks


def as_if_on_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attend_ring_module, "chained", lambda: True)
    monkeypatch.setattr(attend_ring_module, "hardware", lambda: HOPPER)


def test_what_a_ring_takes(monkeypatch: pytest.MonkeyPatch):
    as_if_on_hopper(monkeypatch)
    case = make_decode("cpu", BF16, [300, 2048], heads=(64, 4), dim=128)
    q, kv, batch = case.q.to(BF16), case.kv, case.batch
    assert ring_fits(q, kv, batch, 16)
    assert ring_fits(q[:, :12], kv, batch, 32)
    assert not ring_fits(q, kv, batch, 33), "more blocks than a warp has lanes"
    assert not ring_fits(q, kv, replace(batch, query_len=2), 16), "several query rows"
    assert not ring_fits(q.repeat(1, 2, 1), kv, batch, 16), "32 query heads of a kv head"
    assert not ring_fits(q.float(), kv, batch, 16)
    assert not ring_fits(q, PagedKv(kv.k.float(), kv.v.float()), batch, 16)
    assert not ring_fits(q, PagedKv(kv.k.to(E4M3), kv.v.to(E4M3)), batch, 16)
    scales = torch.ones(kv.k.shape[:3])
    assert not ring_fits(q, replace(kv, k_scale=scales, v_scale=scales), batch, 16)
    assert not ring_fits(q[..., :64], PagedKv(kv.k[..., :64], kv.v[..., :64]), batch, 16), "half of each line"
    assert not ring_fits(q, replace(kv, v=kv.v.contiguous()), batch, 16), "K and V are laid out differently"
    wide = torch.zeros(2, 4 * BLOCK * 128 + 64, dtype=BF16)
    wide = wide.as_strided((2, 4, BLOCK, 128), (4 * BLOCK * 128 + 64, BLOCK * 128, 128, 1))
    assert not ring_fits(q, PagedKv(wide, wide), batch, 16), "half a line too far"
    many = torch.empty_strided((1 << 25, *kv.k.shape[1:]), kv.k.stride(), dtype=BF16, device="meta")
    assert not ring_fits(q, PagedKv(many, many), batch, 16), "more lines than can be counted"
    assert ring_fits(q, PagedKv(many[: 1 << 20], many[: 1 << 20]), batch, 16)
    monkeypatch.setattr(attend_ring_module, "hardware", lambda: Hardware(100, False, 232_448))
    assert not ring_fits(q, kv, batch, 16), "a Blackwell"
    monkeypatch.setattr(attend_ring_module, "chained", lambda: False)
    assert not ring_fits(q, kv, batch, 16), "launches do not overlap"


def plan_of(groups: int, dtype: torch.dtype = BF16) -> AttendPlan:
    """For so many rows of one kv head."""
    q = torch.empty(groups, 16, 128, dtype=BF16)
    pages = torch.empty(1, 1, BLOCK, 128).to(dtype)
    batch = DecodeBatch(torch.empty(groups, dtype=torch.int32), torch.empty(groups, 64, dtype=torch.int32), 1)
    return attend_plan(q, PagedKv(pages, pages), batch, 16)


def test_rings_are_planned_where_they_were_faster(monkeypatch: pytest.MonkeyPatch):
    as_if_on_hopper(monkeypatch)
    found = {groups: plan_of(groups).ring for groups in (1, 32, 64, 96, 128, 133, 256, 300, 512, 768, 1024, 1100, 2048)}
    warps = {groups: ring.warps for groups, ring in found.items() if ring}
    assert warps == {96: 4, 128: 4, 256: 4, 512: 2, 768: 1, 1024: 1, 1100: 2}
    assert plan_of(256, E4M3).ring is None
    monkeypatch.setattr(attend_ring_module, "chained", lambda: False)
    assert plan_of(256).ring is None
    assert plan_of(256).splits == 1


@pytest.mark.parametrize("groups", [96, 132, 264, 501, 528, 1056])
def test_all_programs_of_a_planned_ring_run_at_once(groups: int):
    plan = sparse_attention_decode_module._ring_plan(groups)
    assert plan
    places = -(-groups // 132)  # on an H200
    assert places * (plan.slots * plan.tile * 256 + 2048) <= HOPPER.shared_bytes, plan
    assert places * plan.warps * 32 * 255 <= REGISTERS, plan


@on_hopper
@pytest.mark.parametrize("rounds", [1, 2, 5])
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_a_ring_and_the_reference(ring: tuple[int, int, int], rounds: int):
    """Empty rows and sequences, short ones, NaN behind the last token; 48 and 12 groups, which 5 does not divide."""
    plan = by_ring(*ring, rounds)
    for heads in ((64, 4), (16, 1)):
        case = make_decode("cuda", BF16, LENGTHS, heads=heads, dim=128)
        assert ring_fits(case.q, case.kv, case.batch, 16)
        check(case, untidy(case, 16), plan)
    few_heads = make_decode("cuda", BF16, [300, 5, 1000], heads=(8, 4), dim=128)
    for topk in (1, 3):
        check(few_heads, pick(few_heads, topk), plan)
    check(
        make_decode("cuda", BF16, [0, 0], heads=(16, 1), dim=128), torch.full((2, 1, 16), -1, dtype=torch.int32), plan
    )


@on_hopper
@pytest.mark.parametrize("ring", RINGS, ids=str)
def test_a_row_is_the_same_whatever_is_beside_it(ring: tuple[int, int, int]):
    """Bit for bit: who takes a group, and behind which one, leaves no trace."""
    case = make_decode("cuda", BF16, LENGTHS, heads=(64, 4), dim=128)
    blocks = untidy(case, 16)
    out, lse = attend(case, blocks, by_ring(*ring, 1))
    for rounds in (2, 3, 7, 48):
        again, lse_again = attend(case, blocks, by_ring(*ring, rounds))
        assert torch.equal(again, out)
        assert torch.equal(lse_again, lse)


@on_hopper
@pytest.mark.parametrize("rows", [32, 48, 64, 96, 128, 150, 192, 256, 275, 384, 512])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_as_planned_and_by_the_other_kernel(rows: int, kv_heads: int):
    lengths = [(70 * n) % 401 for n in range(rows)]
    case = make_decode("cuda", BF16, lengths, heads=(16 * kv_heads, kv_heads), dim=128)
    blocks = pick(case, 16)
    out, lse = attend(case, blocks)
    other, other_lse = attend(case, blocks, AttendPlan(1, BLOCK, 4, 2))
    torch.testing.assert_close(out.float(), other.float(), atol=2e-2, rtol=2e-2)
    assert (out.float() - other.float()).abs().mean() < 1e-3
    torch.testing.assert_close(lse, other_lse, atol=1e-3, rtol=1e-3)


@on_hopper
@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("ring", [(1, 32, 3), (4, 64, 4)], ids=str)
def test_a_graph_replayed_after_lengths_and_choice_have_changed(ring: tuple[int, int, int], rounds: int):
    """Three calls one behind another, so that each starts before the one in front has ended."""
    case = make_decode("cuda", BF16, [6000, 3000, 5, 0, 900, 2048, 130], heads=(64, 4), dim=128)
    blocks = pick(case, 16).cuda()
    outs = [torch.empty_like(case.q) for _ in range(3)]
    lses = [torch.empty(case.q.shape[:2], device="cuda") for _ in range(3)]
    workspace, plan = MergeWorkspace(case.q, 1), by_ring(*ring, rounds)

    def run() -> None:
        for out, lse in zip(outs, lses, strict=True):
            sparse_attention_decode_into(out, lse, case.q, case.kv, blocks, case.batch, 128**-0.5, workspace, plan)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([6000, 3000, 5, 0, 900, 2048, 130], [5999, 0, 4, 0, 1, 2047, 129], [0] * 7):
        case.batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        blocks.copy_(pick(case, 16, seed=sum(lengths)))
        for poisoned in (*outs, *lses):
            poisoned.fill_(torch.nan)
        graph.replay()
        torch.cuda.synchronize()
        expected, expected_lse = attend(case, blocks.cpu(), plan)
        for out, lse in zip(outs, lses, strict=True):
            assert torch.equal(out.cpu(), expected)
            assert torch.equal(lse.cpu(), expected_lse)
        check(case, blocks.cpu(), plan)
