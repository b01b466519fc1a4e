"""From a layer's packed projection to its queries and its pages in one launch: norm, rope, one rounding, insertion."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.hardware import hardware
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows
from pdkv_kernels.launch import FEW_PROGRAMS, chained, launch_options
from pdkv_kernels.paged import BLOCK, LayerPages
from pdkv_kernels.rms_norm import inverse_root
from pdkv_kernels.rounding import (
    FORMATS,
    MAX,
    divided,
    magnitude_bits,
    portable,
    round_once,
    store_view,
    token_scale,
)

_MANY_ROWS = 2048
_FEW_ROWS = 64
_VECTORS = 16
"""Vectors of a program, heads times rows."""
_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def kv_store(
    packed: Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages, out: Queries | None = None
) -> Queries:
    """``kv_store_ref``, bit for bit."""
    num_rows, total, dim = packed.shape
    assert total == heads.total, f"{total} heads projected, {heads} are {heads.total}"
    assert packed.stride(2) == 1
    index_k = pages.index_k
    if index_k is not None:
        assert norms.index_q is not None, "a layer that selects blocks has norms of index_q and index_k"
        assert norms.index_k is not None, "a layer that selects blocks has norms of index_q and index_k"
    if out is None:
        out = Queries(torch.empty_like(packed[:, : heads.q], memory_format=torch.contiguous_format), None)
        if index_k is not None:
            dtype = index_k.dtype if index_k.dtype in FORMATS else packed.dtype
            index_q = torch.empty(num_rows, heads.index_q, dim, dtype=dtype, device=packed.device)
            out = Queries(out.q, index_q)
    assert index_k is None or out.index_q is not None, "a layer that selects blocks needs a buffer for index_q"
    if num_rows == 0:
        return out
    # What a layer does not have is never touched; some pointer must stand in its place.
    index_pages = index_k if index_k is not None else pages.kv.k
    index_q = out.index_q if index_k is not None and out.index_q is not None else out.q
    k_scale = pages.kv.k_scale if pages.kv.k_scale is not None else rows.cos
    v_scale = pages.kv.v_scale if pages.kv.v_scale is not None else rows.cos
    k, kv_form = store_view(pages.kv.k)
    v, _ = store_view(pages.kv.v)
    index_pages, index_form = store_view(index_pages)
    index_q, index_q_form = store_view(index_q)
    q, q_form = store_view(out.q)
    scale_strides = k_scale.stride() if pages.kv.k_scale is not None else (0, 0, 0)
    assert pages.kv.v_scale is None or v_scale.stride() == scale_strides
    assert norms.k.stride(0) == norms.q.stride(0) == 1
    rotary_half = rows.cos.shape[1]
    counts = [heads.kv, heads.kv, heads.q] + ([heads.index_q, 1] if index_k is not None else [])
    programs = sum(triton.cdiv(num_rows * count, _VECTORS) for count in counts)
    # Between, programs of the next launch would take places that this one's last programs need.
    early = chained() and (num_rows >= _MANY_ROWS or num_rows <= _FEW_ROWS)
    # In decode the indexer's scan follows, or attention. Their programs start where there is room, and crowd there if
    # many of them fit into a multiprocessor, as do all but a scan's of two-byte keys. They start behind this one, then.
    crowds = index_k is None or index_k.element_size() == 1
    at_once = num_rows >= _MANY_ROWS or num_rows * heads.kv <= FEW_PROGRAMS or not crowds
    _kv_store[(programs,)](
        packed, norms.q, norms.k, norms.index_q if index_k is not None else norms.q,
        norms.index_k if index_k is not None else norms.q, rows.slots, rows.cos, rows.sin,
        q, index_q, k, v, k_scale, v_scale, index_pages,
        num_rows, packed.stride(0), packed.stride(1), rows.cos.stride(0), q.stride(0), q.stride(1),
        index_q.stride(0), index_q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *scale_strides,
        index_pages.stride(0), index_pages.stride(1),
        HEADS_Q=heads.q, HEADS_KV=heads.kv, HEADS_INDEX=heads.index_q,
        DIM=dim, EPS=norms.eps, INDEX=index_k is not None, SCALED=pages.kv.k_scale is not None,
        HALF=rotary_half, HALF_P=triton.next_power_of_2(rotary_half), PARTS=triton.cdiv(dim, rotary_half),
        KV_FORM=kv_form, KV_TYPE=_type(k), KV_MAX=MAX[kv_form], INDEX_FORM=index_form, INDEX_TYPE=_type(index_pages),
        INDEX_Q_FORM=index_q_form, INDEX_Q_TYPE=_type(index_q), Q_FORM=q_form, Q_TYPE=_type(q),
        BLOCK=BLOCK, VECTORS=_VECTORS, PORTABLE=portable(), FLAT=hardware().amd, EARLY=early,
        AT_ONCE=at_once, AHEAD=hardware().nvidia and packed.element_size() == 2 and num_rows > _FEW_ROWS,
        enable_fp_fusion=False, **launch_options(early, 2 if num_rows >= _MANY_ROWS else 4, 1),
    )  # fmt: skip
    return out


def _type(data: Tensor) -> tl.dtype:
    return _TRITON_TYPES.get(data.dtype, tl.uint8)


@triton.jit
def _load_parts(at, column, exists, HALF: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr):
    """Vectors in parts of HALF columns: the two that rotate against each other, and the rest."""
    parts: tl.tuple = ()
    for nth in tl.static_range(PARTS):
        there = exists[:, None] & ((column < HALF) & (nth * HALF + column < DIM))[None, :]
        parts = parts + (tl.load(at[:, None] + (nth * HALF + column)[None, :], mask=there, other=0.0),)
    return parts


@triton.jit
def _widened(parts, PARTS: tl.constexpr):
    wide: tl.tuple = ()
    for nth in tl.static_range(PARTS):
        wide = wide + (parts[nth].to(tl.float32),)
    return wide


@triton.jit
def _after(x, y, zero):
    """x of 16 bits, which cannot be used before y, float32, is there. zero: 0, which no compiler knows."""
    return tl.inline_asm_elementwise(
        "{ .reg .b32 none; and.b32 none, $2, $4; or.b32 $0, $1, none; }", "=r,r,r,r,r,r", [x, y, zero],
        dtype=x.dtype, is_pure=True, pack=2,
    )  # fmt: skip


@triton.jit
def _rotated(
    parts, weight, column, cos_at, sin_at, exists, zero,
    DIM: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Norm, then rope, in parts of float32. weight: where the norm's begins; cos_at, sin_at: each vector's."""
    turns = exists[:, None] & (column < HALF)[None, :]
    cosine = tl.load(cos_at[:, None] + column[None, :], mask=turns, other=0.0)
    sine = tl.load(sin_at[:, None] + column[None, :], mask=turns, other=0.0)
    if AHEAD:
        # Else the compiler, to spare registers, asks for them when the norm is done, and they come a second wait later.
        parts = (_after(parts[0], cosine, zero), _after(parts[1], sine, zero)) + parts[2:]
    parts = _widened(parts, PARTS)
    # In float64 the sum does not depend on its order, so every device and tile size rounds to the same float32.
    squares = (parts[0] * parts[0]).to(tl.float64)
    for nth in tl.static_range(1, PARTS):
        squares += (parts[nth] * parts[nth]).to(tl.float64)
    total = tl.sum(squares, axis=1)
    # Exact either way, but float64 divides by a subroutine.
    mean = total * (1.0 / DIM) if DIM & (DIM - 1) == 0 else total / DIM
    inverse = inverse_root(mean + tl.full(mean.shape, EPS, tl.float64))[:, None]
    normed: tl.tuple = ()
    for nth in tl.static_range(PARTS):
        there = (column < HALF) & (nth * HALF + column < DIM)
        gain = tl.load(weight + nth * HALF + column, mask=there, other=0.0).to(tl.float32)
        normed = normed + (parts[nth] * inverse * (1.0 + gain)[None, :],)
    x = normed[0] * cosine - normed[1] * sine
    y = normed[1] * cosine + normed[0] * sine
    return (x, y) + normed[2:]


@triton.jit
def _either(choice, one, other, FLAT: tl.constexpr):
    """Pointers, ``one`` where ``choice``, else ``other``. FLAT: by way of integers; see ``Hardware.amd``."""
    if FLAT:
        return tl.where(choice, one.to(tl.int64), other.to(tl.int64)).to(one.dtype)
    else:
        return tl.where(choice, one, other)


@triton.jit
def _largest(parts, PARTS: tl.constexpr):
    """Bits of the largest magnitude of each vector."""
    largest = magnitude_bits(parts[0])
    for nth in tl.static_range(1, PARTS):
        largest = tl.maximum(largest, magnitude_bits(parts[nth]))
    return tl.max(largest, axis=1)


@triton.jit
def _store_parts(
    at, parts, column, exists, FORM: tl.constexpr, TYPE: tl.constexpr,
    DIM: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    for nth in tl.static_range(PARTS):
        there = exists[:, None] & ((column < HALF) & (nth * HALF + column < DIM))[None, :]
        tl.store(at[:, None] + (nth * HALF + column)[None, :], round_once(parts[nth], FORM, TYPE, PORTABLE), mask=there)


@triton.jit(do_not_specialize=["num_rows"])
def _kv_store(
    packed, q_weight, k_weight, index_q_weight, index_k_weight, slots, cos, sin,
    q, index_q, k, v, k_scale, v_scale, index_k,
    num_rows, packed_row, packed_head, table_row, q_row, q_head, iq_row, iq_head,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token, i_page, i_token,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEADS_INDEX: tl.constexpr,
    DIM: tl.constexpr, EPS: tl.constexpr, INDEX: tl.constexpr, SCALED: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, PARTS: tl.constexpr,
    KV_FORM: tl.constexpr, KV_TYPE: tl.constexpr, KV_MAX: tl.constexpr, INDEX_FORM: tl.constexpr,
    INDEX_TYPE: tl.constexpr, INDEX_Q_FORM: tl.constexpr, INDEX_Q_TYPE: tl.constexpr, Q_FORM: tl.constexpr,
    Q_TYPE: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr, PORTABLE: tl.constexpr, FLAT: tl.constexpr,
    EARLY: tl.constexpr, AT_ONCE: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Some vectors, all of one kind: k first, whose programs take longest, v, index_q, index_k, and at the end q.

    AHEAD: all that a program reads is asked for before any of it is used.
    """
    if EARLY:
        if AT_ONCE:  # else at the end
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    program = tl.program_id(0)
    nth = tl.arange(0, VECTORS)
    column = tl.arange(0, HALF_P)
    zero = num_rows >> 31
    v_begin = tl.cdiv(num_rows * HEADS_KV, VECTORS)
    index_begin = 2 * v_begin
    q_begin = index_begin
    index_k_begin = index_begin
    if INDEX:
        index_k_begin += tl.cdiv(num_rows * HEADS_INDEX, VECTORS)
        q_begin = index_k_begin + tl.cdiv(num_rows, VECTORS)
    if program >= q_begin:
        vector = (program - q_begin) * VECTORS + nth
        row, head = (vector // HEADS_Q).to(tl.int64), vector % HEADS_Q
        exists = row < num_rows
        parts = _load_parts(packed + row * packed_row + head * packed_head, column, exists, HALF, DIM, PARTS)
        cos_at, sin_at = cos + row * table_row, sin + row * table_row
        parts = _rotated(parts, q_weight, column, cos_at, sin_at, exists, zero, DIM, EPS, HALF, PARTS, AHEAD)
        q_at = q + row * q_row + head * q_head
        _store_parts(q_at, parts, column, exists, Q_FORM, Q_TYPE, DIM, HALF, PARTS, PORTABLE)
    elif INDEX and program >= index_begin:
        is_k = program >= index_k_begin
        vector = (program - tl.where(is_k, index_k_begin, index_begin)) * VECTORS + nth
        row = tl.where(is_k, vector, vector // HEADS_INDEX).to(tl.int64)
        head = tl.where(is_k, HEADS_INDEX, vector % HEADS_INDEX)  # behind q, k and v
        exists = row < num_rows
        slot = tl.load(slots + row, mask=exists, other=-1)
        at = packed + row * packed_row + (HEADS_Q + 2 * HEADS_KV + head) * packed_head
        parts = _load_parts(at, column, exists, HALF, DIM, PARTS)
        weight = _either(is_k, index_k_weight, index_q_weight, FLAT)
        cos_at, sin_at = cos + row * table_row, sin + row * table_row
        parts = _rotated(parts, weight, column, cos_at, sin_at, exists, zero, DIM, EPS, HALF, PARTS, AHEAD)
        index_k_at = index_k + slot // BLOCK * i_page + slot % BLOCK * i_token
        index_q_at = index_q + row * iq_row + head * iq_head
        if INDEX_FORM == INDEX_Q_FORM and INDEX_TYPE == INDEX_Q_TYPE:  # one store: where to is all that differs
            index_at = _either(is_k, index_k_at, index_q_at, FLAT)
            wanted = exists & ((slot >= 0) | (not is_k))
            _store_parts(index_at, parts, column, wanted, INDEX_FORM, INDEX_TYPE, DIM, HALF, PARTS, PORTABLE)
        else:
            wanted = is_k & (slot >= 0)
            _store_parts(index_k_at, parts, column, wanted, INDEX_FORM, INDEX_TYPE, DIM, HALF, PARTS, PORTABLE)
            wanted = exists & (not is_k)
            _store_parts(index_q_at, parts, column, wanted, INDEX_Q_FORM, INDEX_Q_TYPE, DIM, HALF, PARTS, PORTABLE)
    else:
        is_v = program >= v_begin
        vector = (program - tl.where(is_v, v_begin, 0)) * VECTORS + nth
        row, head = (vector // HEADS_KV).to(tl.int64), vector % HEADS_KV
        exists = row < num_rows
        slot = tl.load(slots + row, mask=exists, other=-1)
        at = packed + row * packed_row + (HEADS_Q + tl.where(is_v, HEADS_KV, 0) + head) * packed_head
        read = _load_parts(at, column, exists, HALF, DIM, PARTS)
        if is_v:
            parts = _widened(read, PARTS)
        else:
            cos_at, sin_at = cos + row * table_row, sin + row * table_row
            parts = _rotated(read, k_weight, column, cos_at, sin_at, exists, zero, DIM, EPS, HALF, PARTS, AHEAD)
        stores = slot >= 0
        page, offset = slot // BLOCK, slot % BLOCK
        if SCALED:
            scale = token_scale(_largest(parts, PARTS), exists, KV_FORM, KV_MAX)
            s_at = page * s_page + head * s_head + offset * s_token
            tl.store(_either(is_v, v_scale, k_scale, FLAT) + s_at, scale, mask=stores)
            parts = divided(parts, scale, PARTS, PORTABLE)
        k_at = k + page * k_page + head * k_head + offset * k_token
        v_at = v + page * v_page + head * v_head + offset * v_token
        kv_at = _either(is_v, v_at, k_at, FLAT)
        _store_parts(kv_at, parts, column, stores, KV_FORM, KV_TYPE, DIM, HALF, PARTS, PORTABLE)
