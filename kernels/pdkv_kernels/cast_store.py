"""Round vectors into their pages in one launch: the plain store, which target and draft models share."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.paged import BLOCK
from pdkv_kernels.rounding import MAX, divided, magnitude_bits, portable, round_once, store_view, token_scale

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_VECTORS = 16


def cast_store(values: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None = None) -> None:
    """``cast_store_ref``, bit for bit."""
    if pages.dim() == 3:  # index keys: one head without scales
        assert scales is None
        values, pages = values[:, None], pages[:, None]
    num_rows, heads, dim = values.shape
    assert values.stride(2) == 1
    assert pages.stride(3) == 1
    if num_rows == 0:
        return
    to, form = store_view(pages)
    scale_to = scales if scales is not None else values  # never touched where there are none
    strides = scales.stride() if scales is not None else (0, 0, 0)
    _cast_store[(triton.cdiv(num_rows * heads, _VECTORS),)](
        values, to, slots, scale_to, values.stride(0), values.stride(1), *to.stride()[:3], *strides, num_rows,
        HEADS=heads, DIM=dim, DIM_P=triton.next_power_of_2(dim), FORM=form,
        TYPE=_TRITON_TYPES.get(to.dtype, tl.uint8), MAX=MAX[form], SCALED=scales is not None, BLOCK=BLOCK,
        VECTORS=_VECTORS, PORTABLE=portable(), num_warps=4,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def _cast_store(
    values, pages, slots, scales, values_row, values_head, p_page, p_head, p_token, s_page, s_head, s_token, num_rows,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_P: tl.constexpr, FORM: tl.constexpr, TYPE: tl.constexpr,
    MAX: tl.constexpr, SCALED: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0).to(tl.int64) * VECTORS + tl.arange(0, VECTORS)
    row, head = vector // HEADS, vector % HEADS
    slot = tl.load(slots + row, mask=row < num_rows, other=-1)
    stores = slot >= 0
    page, offset = slot // BLOCK, slot % BLOCK
    d = tl.arange(0, DIM_P)
    mask = stores[:, None] & (d < DIM)[None, :]
    x = tl.load(values + (row * values_row + head * values_head)[:, None] + d[None, :], mask=mask, other=0.0)
    x = x.to(tl.float32)
    if SCALED:
        scale = token_scale(tl.max(magnitude_bits(x), axis=1), stores, FORM, MAX)
        tl.store(scales + page * s_page + head * s_head + offset * s_token, scale, mask=stores)
        x = divided((x,), scale, 1, PORTABLE)[0]
    at = pages + page * p_page + head * p_head + offset * p_token
    tl.store(at[:, None] + d[None, :], round_once(x, FORM, TYPE, PORTABLE), mask=mask)
