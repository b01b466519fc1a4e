"""The indexer's prefill kernels: exactly the reference's choice wherever scores are equal bits, sets elsewhere."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.index_topk_prefill import ScoreTuning, index_topk_prefill, select_blocks
from pdkv_kernels.index_topk_ref import index_topk_ref, select_blocks_ref
from pdkv_kernels.paged import BLOCK, RaggedQueries
from torch import Tensor

from tests.kernels.decode_case import on
from tests.kernels.prefill_case import PrefillCase, make_prefill

CPU = on("cpu", torch.float32)
CUDA = [on("cuda", torch.bfloat16), on("cuda", torch.float8_e4m3fn)]
SOFT = [on("cpu", torch.float8_e4m3fn), on("cpu", torch.float8_e4m3fnuz), on("cpu", torch.float8_e5m2)]
HARD = [on("cuda", torch.float8_e4m3fnuz), on("cuda", torch.float8_e5m2)]

SMALL = ScoreTuning(tile_rows=32, programs=4, select_splits=2)
FEW = [(700, 3), (0, 1), (130, 30), (127, 1), (500, 0), (128, 1), (255, 4)]
LONG = [(0, 1), (0, 129), (127, 2), (2047, 3), (2048, 1), (500, 0), (4095, 70), (10_000, 300), (131_072 - 64, 64)]
DIM = {"cpu": 16, "cuda": 128}


def choose(case: PrefillCase, topk: int, init: int, local: int, tuning: ScoreTuning | None = None) -> Tensor:
    rows, heads, _ = case.index_q.shape
    out = torch.full((rows, heads, topk), 123456789, dtype=torch.int32, device=case.index_q.device)
    tuning = tuning or (SMALL if out.device.type == "cpu" else ScoreTuning())
    return index_topk_prefill(case.index_q, case.index_k, case.queries, topk, init, local, out, tuning).cpu()


def reference(case: PrefillCase, topk: int, init: int, local: int) -> Tensor:
    queries, _ = case.reference()
    return index_topk_ref(case.index_q.cpu().float(), case.index_k.cpu(), queries, topk, init, local)


def whole_numbers(case: PrefillCase) -> PrefillCase:
    """Queries and keys of small whole numbers: every sum is exact, so ties abound and the choice has one answer."""
    kind = case.index_k.dtype
    nan = case.index_k.float().isnan()
    keys = torch.where(nan, torch.nan, (case.index_k.float() * 2).round().clamp(-4, 4))
    case.index_k.view(torch.uint8 if kind.itemsize == 1 else kind).copy_(
        keys.to(kind).view(torch.uint8) if kind.itemsize == 1 else keys.to(kind)
    )
    index_q = (case.index_q.float() * 2).round().clamp(-4, 4).to(case.index_q.dtype)
    return replace(case, index_q=index_q)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
@pytest.mark.parametrize(("init", "local"), [(0, 0), (0, 1), (1, 1), (2, 2)])
def test_equals_the_reference_on_exact_scores(device: str, dtype: torch.dtype, init: int, local: int):
    case = whole_numbers(make_prefill(device, dtype, FEW if device == "cpu" else LONG, dim=DIM[device]))
    topk = 3 if device == "cpu" else 16
    assert torch.equal(choose(case, topk, init, local), reference(case, topk, init, local))


@pytest.mark.parametrize(("device", "dtype"), [*SOFT, *CUDA, *HARD])
def test_every_format(device: str, dtype: torch.dtype):
    case = whole_numbers(make_prefill(device, dtype, [(300, 5), (0, 2)] if device == "cpu" else LONG, dim=DIM[device]))
    topk = 2 if device == "cpu" else 16
    assert torch.equal(choose(case, topk, 0, 1), reference(case, topk, 0, 1))


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_any_number_of_heads(device: str, dtype: torch.dtype, heads: int):
    lengths = [(300, 5)] if device == "cpu" else [(9000, 500), (3, 3)]
    case = whole_numbers(make_prefill(device, dtype, lengths, heads=(heads, heads), dim=DIM[device]))
    assert torch.equal(choose(case, 2, 0, 1), reference(case, 2, 0, 1))


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
def test_real_scores_choose_the_same_but_for_near_ties(device: str, dtype: torch.dtype):
    case = make_prefill(device, dtype, FEW if device == "cpu" else LONG, dim=DIM[device])
    topk = 3 if device == "cpu" else 16
    differs = (choose(case, topk, 0, 1) != reference(case, topk, 0, 1)).float().mean()
    assert differs <= (0.0 if device == "cpu" else 0.02)


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
def test_nan_keys_make_a_block_the_last_choice_but_a_valid_one(device: str, dtype: torch.dtype):
    case = whole_numbers(make_prefill(device, dtype, [(6 * BLOCK, 3)], dim=DIM[device]))
    page = int(case.queries.page_table[0, 2])
    keys = case.index_k[page].float()
    keys[5] = torch.nan
    case.index_k[page] = keys.to(dtype)
    for topk in (8, 6):
        chosen = choose(case, topk, 0, 1)
        assert torch.equal(chosen, reference(case, topk, 0, 1))
        assert (chosen[:, :, 6] == 2).all() if topk == 8 else (chosen != 2).all()


@pytest.mark.parametrize(("device", "dtype"), [CPU, *CUDA])
def test_slices_and_rows_behind_the_last(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch):
    case = whole_numbers(make_prefill(device, dtype, [(100, 40), (300, 90)], dim=DIM[device]))
    monkeypatch.setattr("pdkv_kernels.index_topk_prefill._SCORE_BYTES", 1)
    assert torch.equal(choose(case, 2, 0, 1), reference(case, 2, 0, 1))
    fewer = replace(case.queries, query_starts=torch.tensor([0, 40, 70], dtype=torch.int32, device=device))
    chosen = choose(replace(case, queries=fewer), 2, 0, 1)
    assert (chosen[70:] == -1).all()
    assert torch.equal(chosen[:70], reference(case, 2, 0, 1)[:70])


@pytest.mark.parametrize(("device", "dtype"), [CPU, on("cuda", torch.float32)])
@pytest.mark.parametrize(("init", "local"), [(0, 0), (2, 1)])
@pytest.mark.parametrize("splits", [1, 8])
def test_selection_orders_all_numbers(device: str, dtype: torch.dtype, init: int, local: int, splits: int):
    """Infinities, both zeros, NaN with either sign, the smallest and the largest numbers, and many of each."""
    tiny, large = 1e-45, 3.4028234663852886e38
    kinds = torch.tensor(
        [torch.inf, large, 1.0, tiny, 0.0, -0.0, -tiny, -1.0, -large, -torch.inf, torch.nan, -torch.nan], dtype=dtype
    )
    context, rows, heads, topk = 45 * BLOCK - 2, 4, 2, 16
    scores = kinds[torch.randint(len(kinds), (46, rows * heads))]
    lone = torch.randperm(46)[: len(kinds)]
    scores[:, 0], scores[lone, 0] = torch.nan, kinds  # fewer numbers than places
    starts, lens = torch.tensor([0, rows], dtype=torch.int32), torch.tensor([context], dtype=torch.int32)
    queries = RaggedQueries(starts.to(device), lens.to(device), torch.zeros(1, 46, dtype=torch.int32, device=device))
    out = torch.full((rows, heads, topk), 123456789, dtype=torch.int32, device=device)
    tuning = ScoreTuning(select_splits=splits)
    select_blocks(scores.to(device), queries, (0, rows), (topk, init, local), out, tuning)
    visible = ((context + torch.arange(rows)) // BLOCK + 1)[:, None].expand(rows, heads)
    expected = select_blocks_ref(scores.view(46, rows, heads).permute(1, 2, 0), visible, topk, init, local)
    assert torch.equal(out.cpu(), expected)
