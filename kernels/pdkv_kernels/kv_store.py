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
_WARPS = 4
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
    others = triton.next_power_of_2(total - heads.q)
    vectors = max(32 if num_rows >= _MANY_ROWS else 16, others)  # heads times rows of a program
    q_programs = triton.cdiv(num_rows * heads.q, vectors)
    other_programs = triton.cdiv(num_rows, vectors // others)
    # Between, programs of the next launch would take places that this one's last programs need.
    early = chained() and (num_rows >= _MANY_ROWS or num_rows <= _FEW_ROWS)
    # In decode the indexer's scan follows, or attention. Their programs start where there is room, and crowd there if
    # many of them fit into a multiprocessor, as do all but a scan's of two-byte keys. They start behind this one, then.
    crowds = index_k is None or index_k.element_size() == 1
    at_once = num_rows >= _MANY_ROWS or num_rows * heads.kv <= FEW_PROGRAMS or not crowds
    _kv_store[(other_programs + q_programs,)](
        packed, norms.q, norms.k, norms.index_q if index_k is not None else norms.q,
        norms.index_k if index_k is not None else norms.q, rows.slots, rows.cos, rows.sin,
        q, index_q, k, v, k_scale, v_scale, index_pages,
        num_rows, other_programs, packed.stride(0), packed.stride(1), rows.cos.stride(0), q.stride(0), q.stride(1),
        index_q.stride(0), index_q.stride(1),
        k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *scale_strides,
        index_pages.stride(0), index_pages.stride(1),
        HEADS_Q=heads.q, HEADS_KV=heads.kv, HEADS_INDEX=heads.index_q, OTHERS=total - heads.q, OTHERS_P=others,
        DIM=dim, EPS=norms.eps, INDEX=index_k is not None, SCALED=pages.kv.k_scale is not None,
        HALF=rotary_half, HALF_P=triton.next_power_of_2(rotary_half), PARTS=triton.cdiv(dim, rotary_half),
        KV_FORM=kv_form, KV_TYPE=_type(k), KV_MAX=MAX[kv_form], INDEX_FORM=index_form, INDEX_TYPE=_type(index_pages),
        INDEX_Q_FORM=index_q_form, INDEX_Q_TYPE=_type(index_q), Q_FORM=q_form, Q_TYPE=_type(q),
        BLOCK=BLOCK, VECTORS=vectors, PORTABLE=portable(), FLAT=hardware().amd, EARLY=early,
        AT_ONCE=at_once, enable_fp_fusion=False, **launch_options(early, _WARPS, 1),
    )  # fmt: skip
    return out


def _type(data: Tensor) -> tl.dtype:
    return _TRITON_TYPES.get(data.dtype, tl.uint8)


@triton.jit
def _load_parts(at, column, exists, HALF: tl.constexpr, DIM: tl.constexpr, PARTS: tl.constexpr):
    """Vectors in parts of HALF columns, float32: the two that rotate against each other, and the rest."""
    parts: tl.tuple = ()
    for nth in tl.static_range(PARTS):
        there = exists[:, None] & ((column < HALF) & (nth * HALF + column < DIM))[None, :]
        parts = parts + (tl.load(at[:, None] + (nth * HALF + column)[None, :], mask=there, other=0.0).to(tl.float32),)
    return parts


@triton.jit
def _rotated(
    parts, weights, column, cos_at, sin_at, exists,
    DIM: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Norm, then rope, in parts. weights, cos_at, sin_at: where each vector's own begin."""
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
        there = ((column < HALF) & (nth * HALF + column < DIM))[None, :]
        gain = tl.load(weights[:, None] + (nth * HALF + column)[None, :], mask=there, other=0.0).to(tl.float32)
        normed = normed + (parts[nth] * inverse * (1.0 + gain),)
    turns = exists[:, None] & (column < HALF)[None, :]
    cosine = tl.load(cos_at[:, None] + column[None, :], mask=turns, other=0.0)
    sine = tl.load(sin_at[:, None] + column[None, :], mask=turns, other=0.0)
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


@triton.jit(do_not_specialize=["num_rows", "other_programs"])
def _kv_store(
    packed, q_weight, k_weight, index_q_weight, index_k_weight, slots, cos, sin,
    q, index_q, k, v, k_scale, v_scale, index_k,
    num_rows, other_programs, packed_row, packed_head, table_row, q_row, q_head, iq_row, iq_head,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token, i_page, i_token,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEADS_INDEX: tl.constexpr, OTHERS: tl.constexpr,
    OTHERS_P: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, INDEX: tl.constexpr, SCALED: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, PARTS: tl.constexpr,
    KV_FORM: tl.constexpr, KV_TYPE: tl.constexpr, KV_MAX: tl.constexpr, INDEX_FORM: tl.constexpr,
    INDEX_TYPE: tl.constexpr, INDEX_Q_FORM: tl.constexpr, INDEX_Q_TYPE: tl.constexpr, Q_FORM: tl.constexpr,
    Q_TYPE: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr, PORTABLE: tl.constexpr, FLAT: tl.constexpr,
    EARLY: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Some vectors: heads of q, or, in the first programs, all other heads of some rows."""
    if EARLY:
        if AT_ONCE:  # else at the end
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    nth = tl.arange(0, VECTORS)
    column = tl.arange(0, HALF_P)
    if tl.program_id(0) >= other_programs:
        vector = (tl.program_id(0) - other_programs) * VECTORS + nth
        row, head = (vector // HEADS_Q).to(tl.int64), vector % HEADS_Q
        exists = row < num_rows
        parts = _load_parts(packed + row * packed_row + head * packed_head, column, exists, HALF, DIM, PARTS)
        weights = q_weight + tl.zeros([VECTORS], tl.int32)
        table = row * table_row
        parts = _rotated(parts, weights, column, cos + table, sin + table, exists, DIM, EPS, HALF, PARTS)
        to = q + row * q_row + head * q_head
        for part in tl.static_range(PARTS):
            there = exists[:, None] & ((column < HALF) & (part * HALF + column < DIM))[None, :]
            rounded = round_once(parts[part], Q_FORM, Q_TYPE, PORTABLE)
            tl.store(to[:, None] + (part * HALF + column)[None, :], rounded, mask=there)
    else:
        row = (tl.program_id(0) * (VECTORS // OTHERS_P) + nth // OTHERS_P).to(tl.int64)
        head = nth % OTHERS_P  # behind q's
        # 1: k, 2: v, 3: index_q, 4: index_k, 5: nothing that this layer wants
        kind = 1 + (head >= HEADS_KV).to(tl.int32) + (head >= 2 * HEADS_KV).to(tl.int32)
        kind += (head == OTHERS - 1).to(tl.int32) * (HEADS_INDEX > 0)
        kind = tl.where((head >= OTHERS) | (row >= num_rows) | ((kind >= 3) & (not INDEX)), 5, kind)
        exists = kind < 5
        plain = _load_parts(
            packed + row * packed_row + (HEADS_Q + head) * packed_head, column, exists, HALF, DIM, PARTS
        )
        weights = _either(kind == 3, index_q_weight, _either(kind == 4, index_k_weight, k_weight, FLAT), FLAT)
        table = row * table_row
        turned = _rotated(plain, weights, column, cos + table, sin + table, exists, DIM, EPS, HALF, PARTS)
        parts = ()
        for part in tl.static_range(PARTS):
            parts = parts + (tl.where((kind == 2)[:, None], plain[part], turned[part]),)
        slot = tl.load(slots + row, mask=row < num_rows, other=-1)
        stores = slot >= 0
        page, offset = slot // BLOCK, slot % BLOCK
        kv_head = head % HEADS_KV
        is_k = kind == 1
        is_kv = (kind == 1) | (kind == 2)
        kv_at = _either(
            is_k, k + page * k_page + kv_head * k_head + offset * k_token,
            v + page * v_page + kv_head * v_head + offset * v_token, FLAT,
        )  # fmt: skip
        index_at = index_k + page * i_page + offset * i_token
        index_q_at = index_q + row * iq_row + (head - 2 * HEADS_KV) * iq_head
        if SCALED:
            scale = token_scale(_largest(parts, PARTS), is_kv, KV_FORM, KV_MAX)
            s_at = page * s_page + kv_head * s_head + offset * s_token
            tl.store(_either(is_k, k_scale + s_at, v_scale + s_at, FLAT), scale, mask=is_kv & stores)
            parts = divided(parts, scale, PARTS, PORTABLE)
        index_same: tl.constexpr = INDEX_FORM == KV_FORM and INDEX_TYPE == KV_TYPE
        same: tl.constexpr = index_same and INDEX_Q_FORM == KV_FORM and INDEX_Q_TYPE == KV_TYPE
        for part in tl.static_range(PARTS):
            c = (part * HALF + column)[None, :]
            wanted = ((column < HALF) & (part * HALF + column < DIM))[None, :]
            kept = round_once(parts[part], KV_FORM, KV_TYPE, PORTABLE)
            if INDEX and same:  # one store: where to is all that differs
                at = _either(is_kv, kv_at, _either(kind == 4, index_at, index_q_at, FLAT), FLAT)
                tl.store(at[:, None] + c, kept, mask=(exists & (stores | (kind == 3)))[:, None] & wanted)
            else:
                tl.store(kv_at[:, None] + c, kept, mask=(is_kv & stores)[:, None] & wanted)
            if INDEX and not same:
                if not index_same:
                    kept = round_once(parts[part], INDEX_FORM, INDEX_TYPE, PORTABLE)
                tl.store(index_at[:, None] + c, kept, mask=((kind == 4) & stores)[:, None] & wanted)
                asked = round_once(parts[part], INDEX_Q_FORM, INDEX_Q_TYPE, PORTABLE)
                tl.store(index_q_at[:, None] + c, asked, mask=(kind == 3)[:, None] & wanted)
