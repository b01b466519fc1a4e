"""No result depends on what was in memory before: not in outputs, not in workspaces, not in lists made on the way."""

from collections.abc import Callable
from math import isnan
from typing import Any

import pytest
import torch
from pdkv_kernels.index_scan import ScanPlan
from pdkv_kernels.index_topk_decode import index_topk_decode
from pdkv_kernels.index_topk_prefill import ScoreTuning, index_topk_prefill
from pdkv_kernels.page_digest import page_digest
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions
from pdkv_kernels.paged_attention_prefill import paged_attention_prefill
from pdkv_kernels.sparse_attention_prefill import PrefillTuning, sparse_attention_prefill
from torch import Tensor

from tests.kernels.decode_case import HAS_CUDA
from tests.kernels.prefill_case import choices, make_prefill

DEVICE = "cuda" if HAS_CUDA else "cpu"
DIM = 128 if HAS_CUDA else 16
DTYPES = [torch.bfloat16 if HAS_CUDA else torch.float32, torch.float8_e4m3fn]
FORCED = (4, 0, 1)


def over(bits: float, number: int, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """What ``run`` gives where all memory that it asks for holds these: floats, and integers that index something."""

    def filled(plain: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*sizes: Any, **options: Any) -> Tensor:
            made = plain(*sizes, **options)
            if made.element_size() == 1:
                made.view(torch.uint8).fill_(0x7F if isnan(bits) else 0)
                return made
            return made.fill_(bits if made.is_floating_point() else number)

        return make

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "empty", filled(torch.empty))
        patch.setattr(torch, "empty_like", filled(torch.empty_like))
        return run()


def check(run: Callable[[], tuple[Tensor, ...]]) -> None:
    for one, other in zip(over(torch.nan, 3, run), over(0.0, 0, run), strict=True):
        assert torch.equal(one, other)
        assert not one.float().isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill(dtype: torch.dtype) -> None:
    case = make_prefill(DEVICE, dtype, [(140, 9), (0, 3), (255, 2)], heads=(4, 2), dim=DIM)
    blocks = choices(case.queries, 2, 4, window=4, own=1).to(DEVICE)
    tuning = PrefillTuning(page_programs=2, page_ahead=dtype.itemsize > 1)
    scores = ScoreTuning(programs=2)
    check(lambda: (index_topk_prefill(case.index_q, case.index_k, case.queries, *FORCED, tuning=scores),))
    check(lambda: paged_attention_prefill(case.q, case.kv, case.queries, 0.25))
    check(lambda: sparse_attention_prefill(case.q, case.kv, blocks, case.queries, 0.25, tuning=tuning))


def test_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention's workspaces are full of NaN in its own tests."""
    monkeypatch.setattr("pdkv_kernels.index_topk_decode.scan_plan", lambda _batch, _q, _k, **_: ScanPlan(2, 4, 2))
    case = make_prefill(DEVICE, torch.float8_e4m3fn, [(140, 1), (0, 1), (255, 1)], heads=(4, 2), dim=DIM)
    check(lambda: (index_topk_decode(case.index_q, case.index_k, case.queries, *FORCED),))


def test_digest() -> None:
    rows = torch.arange(4096, device=DEVICE).to(torch.uint8).view(4, 1024)
    two = torch.tensor([0, 4], device=DEVICE)
    regions = DigestRegions(two, torch.full_like(two, 4), two, two)
    check(lambda: (page_digest(rows, regions, DigestPages(two // 4, two, two + 3)),))
