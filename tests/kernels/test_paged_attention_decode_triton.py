"""The decode kernel of dense attention against the reference, outputs poisoned."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.paged_attention_decode import (
    DensePlan,
    dense_plan,
    paged_attention_decode,
    paged_attention_decode_into,
)
from pdkv_kernels.paged_attention_ref import paged_attention_ref
from pdkv_kernels.softmax_merge import MergeWorkspace
from torch import Tensor

from tests.kernels.decode_case import FP8, DecodeCase, cpu, make_decode, on

CPU = on("cpu", torch.float32)
CUDA = [on("cuda", torch.bfloat16), on("cuda", torch.float8_e4m3fn)]
SOFT = [on("cpu", torch.float8_e4m3fnuz), on("cpu", torch.float8_e5m2)]
HARD = [on("cuda", torch.float8_e4m3fnuz), on("cuda", torch.float8_e5m2)]
ANY = [CPU, *CUDA]


def attend(case: DecodeCase, plan: DensePlan | None = None) -> tuple[Tensor, Tensor]:
    """Run the kernels over NaN-poisoned outputs and workspace."""
    device = case.q.device
    rows, heads, dim = case.q.shape
    out = torch.full_like(case.q, torch.nan)
    lse = torch.full((rows, heads), torch.nan, dtype=torch.float32, device=device)
    splits = (plan or dense_plan(case.batch, case.q, case.kv)).splits
    workspace = MergeWorkspace(case.q, splits)
    for part in vars(workspace).values():
        part.fill_(torch.nan)
    paged_attention_decode_into(out, lse, case.q, case.kv, case.batch, dim**-0.5, workspace, plan)
    return out.cpu(), lse.cpu()


def check(case: DecodeCase, plan: DensePlan | None = None) -> None:
    out, lse = attend(case, plan)
    keep = torch.zeros(out.shape[0], dtype=torch.bool)
    keep[[row for row, _, _ in case.live_rows()]] = True
    lens = torch.where(case.batch.seq_lens.cpu() > 0, case.batch.query_len, 0)
    starts = torch.cat((torch.zeros(1, dtype=torch.int32), lens.cumsum(0).int()))
    ragged = case.ragged()
    queries = replace(ragged, query_starts=starts, context_lens=ragged.context_lens.clamp(min=0))
    q = case.q.cpu().float()[keep]
    expected, expected_lse = paged_attention_ref(q, cpu(case.kv), queries, case.q.shape[2] ** -0.5)
    if case.q.dtype == torch.float32:
        close = {"atol": 3e-3, "rtol": 2e-3} if case.kv.k.dtype in FP8 else {"atol": 2e-5, "rtol": 1e-5}
    else:
        close = {"atol": 2e-2, "rtol": 2e-2}
        assert not keep.any() or (out[keep].float() - expected).abs().mean() < 2e-3
    torch.testing.assert_close(out[keep].float(), expected, **close)
    torch.testing.assert_close(lse[keep], expected_lse, **close)
    assert (out[~keep] == 0).all()
    assert (lse[~keep] == -torch.inf).all()


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize(("splits", "tile", "query_len"), [(1, 128, 1), (2, 64, 2), (4, 128, 3)])
def test_splits_tiles_and_query_rows(device: str, dtype: torch.dtype, splits: int, tile: int, query_len: int):
    lengths = [n for n in (1, 127, 130, 0, 300) if n == 0 or n >= query_len]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=(4, 2), dim=32)
    check(case, DensePlan(splits, tile, 4, 2, late=query_len == 2))


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize(("query_len", "query_rows"), [(3, 2), (4, 1), (4, 2)])
def test_programs_that_take_some_of_the_query_rows(device: str, dtype: torch.dtype, query_len: int, query_rows: int):
    lengths = [n for n in (4, 127, 130, 0, 300) if n == 0 or n >= query_len]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=(4, 2), dim=32)
    check(case, DensePlan(3, 64, 4, 2, query_rows))


@pytest.mark.parametrize(("device", "dtype"), ANY)
@pytest.mark.parametrize("heads", [(16, 1), (3, 3)])
def test_head_groups(device: str, dtype: torch.dtype, heads: tuple[int, int]):
    check(make_decode(device, dtype, [129, 5], heads=heads, dim=32))


@pytest.mark.parametrize(("device", "dtype"), [*SOFT, *HARD])
def test_formats_that_the_hardware_has_not(device: str, dtype: torch.dtype):
    check(make_decode(device, dtype, [129, 0], heads=(4, 2), dim=32))


@pytest.mark.parametrize(("device", "dtype"), [*CUDA, *HARD])
@pytest.mark.parametrize("heads", [(16, 1), (64, 4), (8, 4), (8, 1)])
@pytest.mark.parametrize("query_len", [1, 2, 4, 8])
def test_real_dimensions(device: str, dtype: torch.dtype, heads: tuple[int, int], query_len: int):
    lengths = [n for n in (1, 127, 128, 129, 0, 2047, 2048, 2049, 9001) if n == 0 or n >= query_len]
    case = make_decode(device, dtype, lengths, query_len=query_len, heads=heads, dim=128)
    check(case)
    check(case, DensePlan(1, 128, 8, 2))


@pytest.mark.parametrize(("device", "dtype"), ANY)
def test_ragged_queries_as_the_reference_takes_them(device: str, dtype: torch.dtype):
    case = make_decode(device, dtype, [150, 140], query_len=2, heads=(4, 2), dim=32)
    ragged = case.ragged()
    there = replace(ragged, **{name: getattr(ragged, name).to(device) for name in ragged.__dataclass_fields__})
    out, lse = paged_attention_decode(case.q, case.kv, there, 32**-0.5)
    expected, expected_lse = attend(case)
    assert torch.equal(out.cpu(), expected)
    assert torch.equal(lse.cpu(), expected_lse)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_a_graph_replayed_after_the_lengths_have_changed(dtype: torch.dtype):
    case = make_decode("cuda", dtype, [6000, 3000, 5], query_len=4, heads=(16, 1), dim=128)
    rows, heads, dim = case.q.shape
    out, lse = torch.empty_like(case.q), torch.empty(rows, heads, device="cuda")
    workspace = MergeWorkspace(case.q, 128)

    def run() -> None:
        paged_attention_decode_into(out, lse, case.q, case.kv, case.batch, dim**-0.5, workspace)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for lengths in ([6000, 3000, 5], [5999, 0, 4], [0, 0, 0], [2049, 2999, 5]):
        case.batch.seq_lens.copy_(torch.tensor(lengths, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        out.fill_(torch.nan)
        run()
        assert torch.equal(replayed, out)
        check(case)


@pytest.mark.parametrize("num_seqs", [1, 256])
@pytest.mark.parametrize("query_len", [1, 4])
def test_plans_in_float32_keep_to_narrow_tiles_and_few_parts(num_seqs: int, query_len: int):
    """Found by compiling for every device: 128 tokens a tile took 139,264 shared bytes, more than an L4 has."""
    case = make_decode("cpu", torch.float32, [130] * num_seqs, query_len=query_len, heads=(16, 1), dim=32)
    long = replace(case.batch, page_table=case.batch.page_table[:, :1].expand(-1, 4096))
    plan = dense_plan(long, case.q, case.kv)
    assert plan.tile <= 64
    assert plan.splits <= 128
