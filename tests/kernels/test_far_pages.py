"""Pages so far apart that 32 bits do not count the elements between them: what is found there is what is found nearby.

An arena is tens of gigabytes. Here it is four, of which a few pages are touched.
"""

import pytest
import torch
from pdkv_kernels.cast_store import cast_store
from pdkv_kernels.decode_batch import uniform_batch
from pdkv_kernels.index_scan import ScanPlan
from pdkv_kernels.index_topk_decode import IndexWorkspace, SelectionRule, index_topk_decode_into
from pdkv_kernels.index_topk_prefill import index_topk_prefill
from pdkv_kernels.kv_store import kv_store
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, TokenRows
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv
from pdkv_kernels.paged_attention_decode import paged_attention_decode
from pdkv_kernels.paged_attention_prefill import paged_attention_prefill
from pdkv_kernels.sparse_attention_decode import sparse_attention_decode
from pdkv_kernels.sparse_attention_prefill import sparse_attention_prefill
from torch import Tensor

from tests.kernels.decode_case import HAS_CUDA
from tests.kernels.prefill_case import PrefillCase, choices, make_prefill

DEVICE = "cuda" if HAS_CUDA else "cpu"
DTYPE = torch.float8_e4m3fn
DIM = 128 if HAS_CUDA else 16
PITCH = (1 << 30) + 512
TOPK, SCALE = 4, 0.25


def far_from_one_another(case: PrefillCase) -> LayerPages:
    """The case's pages, byte for byte, as rows of an arena of a gibibyte each."""
    near = torch.empty(0, dtype=torch.uint8, device=DEVICE).set_(case.index_k.untyped_storage())
    near = near.view(case.index_k.shape[0], -1)
    rows = torch.empty(near.shape[0], PITCH, dtype=torch.uint8, device=DEVICE)
    rows[:, : near.shape[1]] = near

    def there(view: Tensor) -> Tensor:
        strides = (PITCH // view.element_size(), *view.stride()[1:])
        return rows.flatten().view(view.dtype).as_strided(view.shape, strides, view.storage_offset())

    kv = case.kv
    assert kv.k_scale is not None
    assert kv.v_scale is not None
    return LayerPages(PagedKv(there(kv.k), there(kv.v), there(kv.k_scale), there(kv.v_scale)), there(case.index_k))


def make(lengths: list[tuple[int, int]]) -> tuple[PrefillCase, LayerPages]:
    case = make_prefill(DEVICE, DTYPE, lengths, heads=(4, 2), dim=DIM)
    far = far_from_one_another(case)
    assert int(case.queries.page_table.max()) * far.kv.k.stride(0) > 1 << 31
    return case, far


def test_decode() -> None:
    case, far = make([(130, 1), (127, 1)])
    batch = uniform_batch(case.queries, 2)
    found, nearby = (torch.empty(2, 2, TOPK, dtype=torch.int32, device=DEVICE) for _ in range(2))
    space = IndexWorkspace(2, 2, batch.page_table.shape[1], DEVICE)
    for out, keys in ((found, far.index_k), (nearby, case.index_k)):
        rule = SelectionRule(TOPK, 0, 1)
        index_topk_decode_into(out, case.index_q, keys, batch, rule, space, ScanPlan(2, 4, 2))
    assert torch.equal(found, nearby)
    for there, here in (
        (paged_attention_decode(case.q, kv, case.queries, SCALE) for kv in (far.kv, case.kv)),
        (sparse_attention_decode(case.q, kv, found, case.queries, SCALE) for kv in (far.kv, case.kv)),
    ):
        assert torch.equal(there[0], here[0])
        assert torch.equal(there[1], here[1])


def test_prefill() -> None:
    case, far = make([(130, 3), (0, 2)])
    forced = (TOPK, 0, 1)
    found = index_topk_prefill(case.index_q, far.index_k, case.queries, *forced)
    assert torch.equal(found, index_topk_prefill(case.index_q, case.index_k, case.queries, *forced))
    blocks = choices(case.queries, 2, TOPK, own=1).to(DEVICE)
    for there, here in (
        (paged_attention_prefill(case.q, kv, case.queries, SCALE) for kv in (far.kv, case.kv)),
        (sparse_attention_prefill(case.q, kv, blocks, case.queries, SCALE) for kv in (far.kv, case.kv)),
    ):
        assert torch.equal(there[0], here[0])
        assert torch.equal(there[1], here[1])


@pytest.mark.parametrize("is_fused", [True, False])
def test_stores(is_fused: bool) -> None:
    case, far = make([(130, 2)])
    near = LayerPages(case.kv, case.index_k)
    slots = torch.tensor([page * BLOCK + 3 for page in range(far.kv.k.shape[0])], device=DEVICE)
    if is_fused:
        heads = PackedHeads(2, 2, 2)
        packed = torch.randn(len(slots), heads.total, DIM, device=DEVICE)
        norms = HeadNorms(*(torch.randn(DIM, device=DEVICE) for _ in range(4)), eps=1e-6)
        turns = torch.rand(len(slots), DIM // 4, device=DEVICE)
        for pages in (far, near):
            kv_store(packed, heads, norms, TokenRows(slots, turns, turns), pages)
    else:
        values = torch.randn(len(slots), 2, DIM, device=DEVICE)
        for pages in (far, near):
            cast_store(values, pages.kv.k, slots, pages.kv.k_scale)
            cast_store(values[:, 0], pages.index_k, slots)
    for there, here in zip(_all(far), _all(near), strict=True):
        assert torch.equal(there.view(torch.uint8)[:, ..., 3, :], here.view(torch.uint8)[:, ..., 3, :])


def _all(pages: LayerPages) -> list[Tensor]:
    kv = pages.kv
    assert kv.k_scale is not None
    assert kv.v_scale is not None
    assert pages.index_k is not None
    return [kv.k, kv.v, kv.k_scale[..., None], kv.v_scale[..., None], pages.index_k]
