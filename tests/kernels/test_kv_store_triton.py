"""The fused store and the plain one, bit for bit what the references on the CPU write and return."""

from dataclasses import fields, replace

import pytest
import torch
from pdkv_kernels.cast_store import cast_store
from pdkv_kernels.cast_store_ref import cast_store_ref
from pdkv_kernels.hardware import Hardware
from pdkv_kernels.kv_store import kv_store
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows, kv_store_ref
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv
from pdkv_kernels.rope_ref import rope_table_ref
from torch import Tensor

from tests.kernels.decode_case import on

E4, E4UZ, E5 = torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
CACHES = [
    (F32, F32, False), (BF16, BF16, False), (F16, F16, False), (E4, E4, True), (E4, E4, False), (E5, BF16, True),
    (E4UZ, E4UZ, True), (E4, None, True), (BF16, None, False),
]  # fmt: skip
"""dtype of K and V, dtype of index keys or None for a layer without, whether K and V have scales."""
PARAMS = [on(device, kv, index, scaled) for device in ("cpu", "cuda") for kv, index, scaled in CACHES]
PAGES = 7
# Infinities and NaN are meant; numpy, which the interpreter computes with, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make_pages(
    kv: torch.dtype, index: torch.dtype | None, scaled: bool, heads: int, dim: int
) -> tuple[Tensor, LayerPages]:
    """The views of one layer in rows like an arena's, over memory filled with 0xA5."""
    size, element = kv.itemsize, BLOCK * dim
    head = 2 * element * size + (2 * BLOCK * 4 if scaled else 0)
    base = element * (index.itemsize if index else 0)
    pitch = -(-(base + heads * head) // 512) * 512
    memory = torch.full((PAGES, pitch), 0xA5, dtype=torch.uint8)
    by_head = memory[:, base : base + heads * head].unflatten(1, (heads, head))

    def matrices(at: int) -> Tensor:
        return by_head[..., at : at + element * size].view(kv).unflatten(2, (BLOCK, dim))

    pages = PagedKv(matrices(0), matrices(element * size))
    if scaled:
        scales = by_head[..., 2 * element * size :].view(torch.float32)
        pages = replace(pages, k_scale=scales[..., :BLOCK], v_scale=scales[..., BLOCK:])
    keys = memory[:, :base].view(index).unflatten(1, (BLOCK, dim)) if index else None
    return memory, LayerPages(pages, keys)


def moved(pages: LayerPages, memory: Tensor) -> LayerPages:
    """The same views over a copy of their memory."""

    def there(view: Tensor | None) -> Tensor | None:
        if view is None:
            return None
        return memory.flatten().view(view.dtype).as_strided(view.shape, view.stride(), view.storage_offset())

    kv = PagedKv(*(there(getattr(pages.kv, field.name)) for field in fields(PagedKv)))
    return LayerPages(kv, there(pages.index_k))


def same(one: Tensor, other: Tensor) -> None:
    """Equal bits, but that any NaN equals any."""
    one, other = one.cpu(), other.cpu()
    assert one.dtype == other.dtype
    both_nan = one.float().isnan() & other.float().isnan()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[one.element_size()]
    assert ((one.contiguous().view(bits) == other.contiguous().view(bits)) | both_nan).all()


def make_rows(device: str, heads: PackedHeads, dim: int, dtype: torch.dtype) -> tuple[Tensor, HeadNorms, TokenRows]:
    """Vectors of wildly different magnitude, one of zeros, one with NaN, one with infinity; two rows without slots."""
    num_rows = 9 if device == "cpu" else 301
    spread = torch.exp2(torch.randint(-20, 20, (num_rows, heads.total, 1)).float())
    packed = (torch.randn(num_rows, heads.total, dim) * spread).to(dtype)
    packed[2, heads.q :] = 0.0
    packed[3, heads.q, 1] = torch.nan
    packed[4, heads.q + heads.kv, 2:5] = torch.tensor([torch.inf, 0.0, -0.0])
    packed[5] = torch.linspace(-470, 470, dim)
    weights = (
        [torch.randn(dim) for _ in range(4)] if heads.index_q else [torch.randn(dim), torch.randn(dim), None, None]
    )
    weights[1][[2, dim - 1]] = -1.0  # a gain of zero: zeros of both signs
    slots = torch.randperm(PAGES * BLOCK)[:num_rows]
    slots[[1, 6]] = -1
    rows = TokenRows(slots, *rope_table_ref(torch.arange(num_rows) * 3571, dim // 2, 5e6))
    return packed, HeadNorms(*weights, eps=1e-6), rows


@pytest.mark.parametrize(("device", "kv", "index", "scaled"), PARAMS)
@pytest.mark.parametrize("counts", [(8, 4, 4), (2, 1, 1)], ids=str)
def test_fused_store_equals_the_reference_bit_for_bit(
    device: str, kv: torch.dtype, index: torch.dtype | None, scaled: bool, counts: tuple[int, int, int]
):
    dim = 16 if device == "cpu" else 128
    if device == "cuda" and counts[0] == 8:
        counts = (64, 4, 4)
    heads = PackedHeads(*counts)
    packed, norms, rows = make_rows(device, heads, dim, F32 if device == "cpu" else BF16)
    memory, pages = make_pages(kv, index, scaled, heads.kv, dim)
    there = memory.to(device, copy=True)
    expected = kv_store_ref(packed, heads, norms, rows, pages)
    views = moved(pages, there)
    weights = (norms.q, norms.k, norms.index_q, norms.index_k)
    on_device = HeadNorms(*(None if w is None else w.to(device) for w in weights), eps=norms.eps)
    step = TokenRows(rows.slots.to(device), rows.cos.to(device), rows.sin.to(device))
    got = kv_store(packed.to(device), heads, on_device, step, views)
    same(got.q, expected.q)
    assert (got.index_q is None) == (expected.index_q is None)
    if expected.index_q is not None:
        same(got.index_q, expected.index_q)
    for mine, theirs in zip((views.kv.k, views.kv.v), (pages.kv.k, pages.kv.v), strict=True):
        same(mine, theirs)
    # Every byte of the rows but NaN's payload: nothing else was touched.
    assert int((there.cpu() != memory).sum()) <= 4 * 2 * dim


@pytest.mark.parametrize(("device", "kv", "index", "scaled"), [on("cuda", E4, E4, True), on("cuda", BF16, BF16, False)])
def test_many_rows_which_are_launched_otherwise_give_the_same_bits(
    device: str, kv: torch.dtype, index: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pdkv_kernels.kv_store._MANY_ROWS", 1)
    test_fused_store_equals_the_reference_bit_for_bit(device, kv, index, scaled, (8, 4, 4))


@pytest.mark.parametrize(("device", "dtype"), [on("cpu", F32), on("cuda", BF16)])
def test_a_dense_layer_and_buffers_in_dtypes_of_their_own(device: str, dtype: torch.dtype):
    for heads, index in ((PackedHeads(6, 2), None), (PackedHeads(6, 2, 2), F32)):
        packed, norms, rows = make_rows(device, heads, 32, dtype)
        memory, pages = make_pages(F16, index, False, 2, 32)
        views = moved(pages, memory.to(device, copy=True))
        index_q = torch.full((len(packed), 2, 32), torch.nan).to(E4) if index else None
        buffers = Queries(torch.full((len(packed), 6, 32), torch.nan), index_q)
        out = Queries(buffers.q.to(device), None if index_q is None else index_q.to(device, copy=True))
        expected = kv_store_ref(packed, heads, norms, rows, pages, buffers)
        weights = (norms.q, norms.k, norms.index_q, norms.index_k)
        on_device = HeadNorms(*(None if w is None else w.to(device) for w in weights), eps=norms.eps)
        step = TokenRows(rows.slots.to(device), rows.cos.to(device), rows.sin.to(device))
        assert kv_store(packed.to(device), heads, on_device, step, views, out) is out
        same(out.q, expected.q)
        if index:
            same(out.index_q, expected.index_q)
        same(views.kv.k, pages.kv.k)


@pytest.mark.parametrize(("device", "kv", "index", "scaled"), [on("cpu", E4UZ, E4UZ, True), on("cpu", E5, BF16, True)])
def test_pointers_that_are_chosen_as_integers_reach_the_same_places(
    device: str, kv: torch.dtype, index: torch.dtype, scaled: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("pdkv_kernels.kv_store.hardware", lambda: Hardware(0, True, 1 << 16))
    test_fused_store_equals_the_reference_bit_for_bit(device, kv, index, scaled, (2, 1, 1))


@pytest.mark.parametrize(("device", "kv", "index", "scaled"), PARAMS)
def test_plain_store_equals_the_reference_bit_for_bit(
    device: str, kv: torch.dtype, index: torch.dtype | None, scaled: bool
):
    dim = 16 if device == "cpu" else 128
    packed, _, rows = make_rows(device, PackedHeads(0, 4), dim, F32)
    memory, pages = make_pages(kv, index, scaled, 4, dim)
    there = memory.to(device, copy=True)
    views = moved(pages, there)
    values, keys = packed[:, :4], packed[:, 5]
    cast_store_ref(values, pages.kv.k, rows.slots, pages.kv.k_scale)
    cast_store(values.to(device), views.kv.k, rows.slots.to(device), views.kv.k_scale)
    if pages.index_k is not None:
        cast_store_ref(keys, pages.index_k, rows.slots)
        cast_store(keys.to(device), views.index_k, rows.slots.to(device))
    same(views.kv.k, pages.kv.k)
    assert int((there.cpu() != memory).sum()) <= 4 * 2 * dim
