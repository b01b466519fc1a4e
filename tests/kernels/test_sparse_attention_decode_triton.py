"""The decode kernel of attention to selected blocks against the reference, outputs poisoned."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.paged import BLOCK
from pdkv_kernels.softmax_merge import MergeWorkspace
from pdkv_kernels.sparse_attention_decode import (
    AttendPlan,
    sparse_attention_decode,
    sparse_attention_decode_into,
)
from pdkv_kernels.sparse_attention_ref import sparse_attention_ref
from torch import Tensor

from tests.kernels.decode_case import FP8, DecodeCase, cpu, make_decode, on

CPU = on("cpu", torch.float32)
CUDA = [on("cuda", torch.bfloat16), on("cuda", torch.float8_e4m3fn)]
SOFT = [on("cpu", torch.float8_e4m3fn), on("cpu", torch.float8_e4m3fnuz), on("cpu", torch.float8_e5m2)]
HARD = [on("cuda", torch.float8_e4m3fnuz), on("cuda", torch.float8_e5m2)]
ANY = [CPU, *CUDA]


def pick(case: DecodeCase, topk: int, seed: int = 0) -> Tensor:
    """Random visible blocks of every row and head, the row's own among them: left-packed int32, -1 behind."""
    generator = torch.Generator().manual_seed(seed)
    rows, kv_heads, _ = case.index_q.shape
    blocks = torch.full((rows, kv_heads, topk), -1, dtype=torch.int32)
    for row, _, position in case.live_rows():
        own = position // BLOCK
        for head in range(kv_heads):
            others = torch.randperm(own, generator=generator)[: topk - 1]
            chosen = torch.cat((torch.tensor([own]), others)).int()
            blocks[row, head, : chosen.numel()] = chosen
    return blocks


def attend(case: DecodeCase, blocks: Tensor, plan: AttendPlan | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernels over NaN-poisoned outputs and workspace."""
    device = case.q.device
    rows, heads, dim = case.q.shape
    out = torch.full_like(case.q, torch.nan)
    lse = torch.full((rows, heads), torch.nan, dtype=torch.float32, device=device)
    workspace = MergeWorkspace(case.q, blocks.shape[2])
    for part in vars(workspace).values():
        part.fill_(torch.nan)
    there = blocks.to(device)
    sparse_attention_decode_into(out, lse, case.q, case.kv, there, case.batch, dim**-0.5, workspace, plan)
    return out.cpu(), lse.cpu()


def check(case: DecodeCase, blocks: Tensor, plan: AttendPlan | None = None) -> None:
    out, lse = attend(case, blocks, plan)
    scale = case.q.shape[2] ** -0.5
    live = [row for row, _, _ in case.live_rows()]
    ragged = case.ragged()
    keep = torch.zeros(out.shape[0], dtype=torch.bool)
    keep[live] = True
    lens = torch.where(case.batch.seq_lens.cpu() > 0, case.batch.query_len, 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()))
    queries = replace(ragged, query_starts=starts, context_lens=ragged.context_lens.clamp(min=0))
    expected, expected_lse = sparse_attention_ref(
        case.q.cpu().float()[keep], cpu(case.kv), blocks[keep], queries, scale
    )
    exact = case.q.dtype == torch.float32
    close = {"atol": 3e-3 if case.kv.k.dtype in FP8 else 2e-5, "rtol": 2e-3 if case.kv.k.dtype in FP8 else 1e-5}
    close = close if exact else {"atol": 2e-2, "rtol": 2e-2}
    torch.testing.assert_close(out[keep].float(), expected, **close)
    torch.testing.assert_close(lse[keep], expected_lse, atol=close["atol"], rtol=close["rtol"])
    if not exact and live:  # of no rows there is no mean
        assert (out[keep].float() - expected).abs().mean() < 2e-3
    assert (out[~keep] == 0).all()
    assert (lse[~keep] == -torch.inf).all()


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize(("splits", "tile", "late"), [(1, 128, False), (2, 64, True), (4, 128, False)])
def test_splits_and_tiles(device: str, dtype: torch.dtype, splits: int, tile: int, late: bool):
    case = make_decode(device, dtype, [1, 128, 129, 0, 700], dim=32)
    check(case, pick(case, 4), AttendPlan(splits, tile, 4, 2, late))


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("query_len", [2, 4])
def test_several_query_rows(device: str, dtype: torch.dtype, query_len: int):
    case = make_decode(device, dtype, [130, 0, 257], query_len=query_len, heads=(4, 2), dim=32)
    check(case, pick(case, 3))


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("heads", [(4, 2), (8, 1), (16, 1), (3, 3)])
def test_head_groups(device: str, dtype: torch.dtype, heads: tuple[int, int]):
    case = make_decode(device, dtype, [300, 5], heads=heads, dim=32)
    check(case, pick(case, 3))


@pytest.mark.parametrize(("device", "dtype"), [*CUDA, *HARD])
@pytest.mark.parametrize("heads", [(16, 1), (32, 2), (64, 4), (8, 4), (8, 1)])
@pytest.mark.parametrize("query_len", [1, 4, 8])
def test_real_dimensions(device: str, dtype: torch.dtype, heads: tuple[int, int], query_len: int):
    lengths = [n for n in (1, 127, 128, 129, 0, 2047, 2048, 2049, 4097, 65_537) if n == 0 or n >= query_len]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=heads, dim=128)
    blocks = pick(case, 16)
    check(case, blocks)
    for plan in (AttendPlan(1, 128, 4, 2), AttendPlan(2, 64, 4, 3), AttendPlan(16, 64, 8, 2)):
        check(case, blocks, plan)


@pytest.mark.parametrize(("device", "dtype"), [*SOFT, *HARD])
def test_formats_that_the_hardware_has_not(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [129, 640, 0], dim=32)
    check(case, pick(case, 3))


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", torch.float8_e4m3fn), on("cuda", torch.float8_e4m3fn)])
def test_values_at_odd_addresses_cannot_be_read_in_pairs(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [300, 5], dim=32)
    v = case.kv.v
    memory = torch.empty(v.numel() + 1, dtype=torch.uint8, device=device)
    odd = memory[1:].view(dtype).view(v.shape)
    odd.view(torch.uint8).copy_(v.contiguous().view(torch.uint8))
    blocks = pick(case, 3)
    check(replace(case, kv=replace(case.kv, v=odd)), blocks)


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_holes_order_and_unseen_blocks_do_not_matter(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [705], dim=32)
    tidy = torch.tensor([5, 2, 0, -1, -1], dtype=torch.int32).expand(1, 4, 5)
    untidy = torch.tensor([-1, 0, 6, 2, 5], dtype=torch.int32).expand(1, 4, 5)
    plan = AttendPlan(2, 128, 4, 2)
    close = {"atol": 1e-5, "rtol": 1e-5} if device == "cpu" else {"atol": 1e-2, "rtol": 1e-2}
    for one, other in zip(attend(case, tidy, plan), attend(case, untidy, plan), strict=True):
        torch.testing.assert_close(one, other, **close)


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_a_row_without_blocks_gives_zero_and_its_neighbours_are_unharmed(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [303], query_len=3, dim=32)
    blocks = torch.tensor([2, 0], dtype=torch.int32).expand(3, 4, 2).clone()
    whole, _ = attend(case, blocks)
    blocks[1] = -1
    for plan in (None, AttendPlan(1, 128, 4, 2)):
        out, lse = attend(case, blocks, plan)
        assert (out[1] == 0).all()
        assert (lse[1] == -torch.inf).all()
        torch.testing.assert_close(out[[0, 2]], whole[[0, 2]], atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_ragged_queries_as_the_reference_takes_them(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [300, 140], query_len=2, heads=(4, 2), dim=32)
    blocks = pick(case, 3)
    ragged = case.ragged()
    there = replace(ragged, **{name: getattr(ragged, name).to(device) for name in ragged.__dataclass_fields__})
    out, lse = sparse_attention_decode(case.q, case.kv, blocks.to(device), there, 32**-0.5)
    expected, expected_lse = attend(case, blocks)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", torch.float8_e4m3fnuz), on("cuda", torch.float8_e4m3fn)])
def test_scales_count(device: str, dtype: torch.dtype):
    """Halved V scales halve the output, and K's scales change it."""
    case = make_decode(device, dtype, [300], dim=32)
    blocks = pick(case, 3)
    out, lse = attend(case, blocks)
    kv = case.kv
    half, same_lse = attend(replace(case, kv=replace(kv, v_scale=kv.v_scale * 0.5)), blocks)
    torch.testing.assert_close(half.float() * 2, out.float(), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(same_lse, lse)
    other, _ = attend(replace(case, kv=replace(kv, k_scale=kv.k_scale * 4.0)), blocks)
    assert (other - out).abs().max() > 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_graph_replayed_after_lengths_and_choice_have_changed(dtype: torch.dtype):
    case = make_decode("cuda", dtype, [6000, 3000, 5], query_len=4, heads=(16, 1), dim=128)
    rows, heads, dim = case.q.shape
    blocks = pick(case, 16).cuda()
    out, lse = torch.empty_like(case.q), torch.empty(rows, heads, device="cuda")
    workspace = MergeWorkspace(case.q, 16)

    def run() -> None:
        sparse_attention_decode_into(out, lse, case.q, case.kv, blocks, case.batch, dim**-0.5, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([6000, 3000, 5], [5999, 0, 4], [0, 0, 0], [2049, 2999, 5]):
        case.batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        blocks.copy_(pick(case, 16, seed=sum(lengths)))
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        out.fill_(torch.nan)
        run()
        assert torch.equal(replayed, out)
        check(case, blocks.cpu())
