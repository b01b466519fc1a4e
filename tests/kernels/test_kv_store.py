"""Insertion of new tokens into strided pages: cast alone, and fused with norm and rope."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.cast_store_ref import cast_store_ref
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows, kv_store_ref
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv
from pdkv_kernels.quantise_ref import quantise_ref, token_scale_ref
from pdkv_kernels.rope_ref import rope_table_ref

from tests.kernels.paged_case import make_case

NUM_PAGES, KV_HEADS, DIM = 7, 4, 16
ROWS = torch.tensor([2 * BLOCK + 127, 0, 2 * BLOCK + 126, -1, 5 * BLOCK + 64, BLOCK + 3, -1])
FLOATS = [torch.float32, torch.bfloat16, torch.float16]
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["k", "v", "index_k"])
def test_a_cast_store_writes_its_rows_bit_exactly_and_nothing_else(dtype: torch.dtype, name: str):
    case = make_case([(300, 4)], dtype=dtype)
    pages = {"k": case.kv.k, "v": case.kv.v, "index_k": case.index_k}[name]
    memory = torch.empty(0, dtype=dtype).set_(pages.untyped_storage())
    before = memory.clone()
    heads = () if name == "index_k" else (4,)
    slots = ROWS.clamp(max=5 * BLOCK + 64)
    values = torch.randn(len(slots), *heads, 16)
    values.view(-1)[:3] = torch.tensor([1.00390625, 3.4e38, -0.0])  # a tie between two bfloat16, an overflow
    cast_store_ref(values, pages, slots)
    num_stored = 0
    for value, slot in zip(values, slots.tolist(), strict=True):
        if slot < 0:
            continue
        page, offset = divmod(slot, BLOCK)
        stored = pages[page, offset] if name == "index_k" else pages[page, :, offset]
        assert torch.equal(stored, value.to(dtype))
        num_stored += value.numel()
    changed = ~((memory == before) | (memory.isnan() & before.isnan()))
    assert int(changed.sum()) <= num_stored


def row_views(
    kv_dtype: torch.dtype, index_dtype: torch.dtype | None, *, scaled: bool
) -> tuple[torch.Tensor, LayerPages]:
    """The views of one layer cut out of rows as an arena's are: index keys, then head by head K, V, scales."""
    kv_size, index_size = kv_dtype.itemsize, index_dtype.itemsize if index_dtype else 0
    element = BLOCK * DIM
    head = 2 * element * kv_size + (2 * BLOCK * 4 if scaled else 0)
    pitch = -(-(element * index_size + KV_HEADS * head) // 64) * 64 + 64
    memory = torch.full((NUM_PAGES * pitch,), 0xA5, dtype=torch.uint8)

    def view(dtype: torch.dtype, at: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> torch.Tensor:
        return memory.view(dtype).as_strided(shape, [s // dtype.itemsize for s in strides], at // dtype.itemsize)

    def heads(dtype: torch.dtype, at: int) -> torch.Tensor:
        size = dtype.itemsize
        return view(dtype, at, (NUM_PAGES, KV_HEADS, BLOCK, DIM), (pitch, head, DIM * size, size))

    def scales(at: int) -> torch.Tensor:
        return view(torch.float32, at, (NUM_PAGES, KV_HEADS, BLOCK), (pitch, head, 4))

    base = element * index_size
    after = base + 2 * element * kv_size
    kv = PagedKv(heads(kv_dtype, base), heads(kv_dtype, base + element * kv_size))
    if scaled:
        kv = replace(kv, k_scale=scales(after), v_scale=scales(after + 4 * BLOCK))
    index_k = None
    if index_dtype:
        index_k = view(index_dtype, 0, (NUM_PAGES, BLOCK, DIM), (pitch, DIM * index_size, index_size))
    return memory, LayerPages(kv, index_k)


class Projected:
    """Rows of a packed projection with everything that turns them."""

    def __init__(self, dtype: torch.dtype = torch.float32, *, with_index: bool = True, slots: torch.Tensor = ROWS):
        self.heads = PackedHeads(8, KV_HEADS, KV_HEADS if with_index else 0)
        # Magnitudes that differ wildly from token to token and head to head.
        spread = torch.exp2(torch.randint(-20, 20, (len(slots), self.heads.total, 1)).float())
        self.packed = (torch.randn(len(slots), self.heads.total, DIM) * spread).to(dtype)
        weights = [torch.randn(DIM) for _ in range(4)]
        self.norms = HeadNorms(*weights[:2], *(weights[2:] if with_index else (None, None)), eps=1e-6)
        self.rows = TokenRows(slots, *rope_table_ref(torch.arange(len(slots)) * 1777, DIM // 2, 5e6))

    def store(self, pages: LayerPages, out: Queries | None = None) -> Queries:
        return kv_store_ref(self.packed, self.heads, self.norms, self.rows, pages, out)

    def turned(self, first: int, count: int, weight: torch.Tensor) -> torch.Tensor:
        """Norm and rope one vector and one pair at a time, in float64: [num_rows, count, DIM]."""
        wide = self.packed[:, first : first + count].double()
        wide = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-6).sqrt() * (1 + weight.double())
        out, quarter = wide.clone(), DIM // 4
        for i in range(quarter):
            c, s = self.rows.cos[:, None, i].double(), self.rows.sin[:, None, i].double()
            out[..., i] = wide[..., i] * c - wide[..., i + quarter] * s
            out[..., i + quarter] = wide[..., i + quarter] * c + wide[..., i] * s
        return out


def stored(pages: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """What lies in the slots, by rows; padded rows left out."""
    kept = slots[slots >= 0]
    index = (kept // BLOCK, slice(None), kept % BLOCK) if pages.dim() == 4 or pages.shape[1] == KV_HEADS else None
    return pages[index] if index is not None else pages[kept // BLOCK, kept % BLOCK]


def half_step(dtype: torch.dtype, expected: torch.Tensor) -> torch.Tensor:
    """Half of the distance between neighbours at ``expected``, and float32's own noise on top."""
    info = torch.finfo(dtype)
    return (
        torch.clamp(expected.abs() * info.eps / 2, min=info.tiny * info.eps / 2) * 1.001 + expected.abs() * 1e-5 + 1e-6
    )


@pytest.mark.parametrize("index_dtype", [*FLOATS, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("kv_dtype", [*FLOATS, *FP8], ids=str)
def test_fused_store_equals_norm_rope_and_one_rounding(kv_dtype: torch.dtype, index_dtype: torch.dtype):
    case = Projected()
    _, pages = row_views(kv_dtype, index_dtype, scaled=False)
    asked = case.store(pages)
    kept = ROWS >= 0
    expected = case.turned(8, 4, case.norms.k)[kept]
    assert ((stored(pages.kv.k, ROWS).double() - expected).abs() <= half_step(kv_dtype, expected)).all()
    v = case.packed[kept, 12:16]
    assert torch.equal(stored(pages.kv.v, ROWS).float(), quantise_ref(v, kv_dtype).float())
    expected = case.turned(20, 1, case.norms.index_k)[kept, 0]
    assert ((stored(pages.index_k, ROWS).double() - expected).abs() <= half_step(index_dtype, expected)).all()
    torch.testing.assert_close(asked.q.double(), case.turned(0, 8, case.norms.q), atol=1e-5, rtol=1e-5)
    assert asked.q.dtype == torch.float32
    expected = case.turned(16, 4, case.norms.index_q)
    asked_in = index_dtype if index_dtype == torch.float8_e4m3fn else torch.float32
    assert asked.index_q.dtype == asked_in
    assert ((asked.index_q.double() - expected).abs() <= half_step(asked_in, expected)).all()


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fused_store_with_scales(dtype: torch.dtype):
    case = Projected()
    _, pages = row_views(dtype, torch.float8_e4m3fn, scaled=True)
    case.store(pages)
    kept = ROWS >= 0
    v = case.packed[kept, 12:16]
    assert torch.equal(stored(pages.kv.v_scale, ROWS), token_scale_ref(v, dtype))
    assert torch.equal(stored(pages.kv.v, ROWS).float(), quantise_ref(v, dtype, token_scale_ref(v, dtype)).float())
    assert float(stored(pages.kv.v_scale, ROWS).max() / stored(pages.kv.v_scale, ROWS).min()) > 1e4
    expected = case.turned(8, 4, case.norms.k)[kept]
    scale = stored(pages.kv.k_scale, ROWS)
    torch.testing.assert_close(scale.double(), expected.abs().amax(-1) / torch.finfo(dtype).max, rtol=1e-5, atol=0)
    back = stored(pages.kv.k, ROWS).double() * scale[..., None]
    bound = half_step(dtype, expected / scale[..., None]) * scale[..., None]
    assert ((back - expected).abs() <= bound + 1e-5 * expected.abs().amax(-1, keepdim=True)).all()


@pytest.mark.parametrize("scaled", [False, True])
def test_nothing_but_the_slots_changes_and_padded_rows_store_nothing(scaled: bool):
    case = Projected()
    memory, pages = row_views(torch.float8_e4m3fn, torch.bfloat16, scaled=scaled)
    before = memory.clone()
    asked = case.store(pages)
    written = 5 * (2 * KV_HEADS * DIM + 2 * DIM + (2 * KV_HEADS * 4 if scaled else 0))
    changed = int((memory != before).sum())
    assert 0.8 * written < changed <= written
    assert asked.q.isfinite().all()
    other = memory.clone()
    Projected(slots=torch.full((7,), -1)).store(pages)
    assert torch.equal(memory, other)


def test_a_dense_layer_has_no_index_and_a_reusing_layer_passes_it_over():
    dense = Projected(with_index=False)
    _, pages = row_views(torch.bfloat16, None, scaled=False)
    assert dense.store(pages).index_q is None
    reusing = Projected()
    reusing.packed[:, 16:] = torch.nan  # index_q and index_k: nobody looks
    memory, pages = row_views(torch.float8_e4m3fn, None, scaled=True)
    asked = reusing.store(pages)
    assert asked.index_q is None
    assert asked.q.isfinite().all()
    assert stored(pages.kv.k_scale, ROWS).isfinite().all()
    assert memory.numel() > 0


def test_buffers_are_filled_in_their_own_dtypes():
    case = Projected(torch.bfloat16)
    _, pages = row_views(torch.bfloat16, torch.bfloat16, scaled=False)
    returned = case.store(pages)
    assert (returned.q.dtype, returned.index_q.dtype) == (torch.bfloat16, torch.bfloat16)
    out = Queries(torch.full((7, 8, DIM), torch.nan), torch.full((7, 4, DIM), torch.nan).to(torch.float8_e4m3fn))
    assert case.store(pages, out) is out
    torch.testing.assert_close(out.q.double(), case.turned(0, 8, case.norms.q), atol=1e-5, rtol=1e-5)
    assert torch.equal(out.q.bfloat16(), returned.q)
    expected = case.turned(16, 4, case.norms.index_q)
    assert ((out.index_q.double() - expected).abs() <= half_step(torch.float8_e4m3fn, expected)).all()


def test_state_is_rounded_once_not_by_way_of_the_packed_dtype():
    """A value whose bfloat16 lies on a tie of e4m3: rounding twice would go to even, once goes up."""
    values = torch.full((1, KV_HEADS, DIM), 1.0625 + 2.0**-12)
    _, pages = row_views(torch.float8_e4m3fn, None, scaled=False)
    cast_store_ref(values, pages.kv.k, torch.tensor([5]))
    assert (pages.kv.k[0, :, 5].float() == 1.125).all()
    assert (values.bfloat16().to(torch.float8_e4m3fn).float() == 1.0).all()


def test_a_projection_of_other_heads_is_refused():
    case = Projected()
    _, pages = row_views(torch.float32, torch.float32, scaled=False)
    case.packed = case.packed[:, :-1]
    with pytest.raises(AssertionError, match="20 heads projected"):
        case.store(pages)
