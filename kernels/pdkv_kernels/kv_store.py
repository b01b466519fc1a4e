"""From a layer's packed projection to its queries and its pages in one launch: norm, rope, one rounding, insertion."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, Queries, TokenRows
from pdkv_kernels.paged import BLOCK, LayerPages
from pdkv_kernels.rounding import FORMATS, MAX, magnitude_bits, round_once, store_view, token_scale

_VECTORS = 16
"""Heads times rows that a program takes."""
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
    rest = dim - 2 * rotary_half
    others = triton.next_power_of_2(total - heads.q)
    q_programs = triton.cdiv(num_rows * heads.q, _VECTORS)
    other_programs = triton.cdiv(num_rows, max(1, _VECTORS // others))
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
        HALF=rotary_half, HALF_P=triton.next_power_of_2(rotary_half), REST=rest,
        REST_P=triton.next_power_of_2(max(rest, 1)),
        KV_FORM=kv_form, KV_TYPE=_type(k), KV_MAX=MAX[kv_form], INDEX_FORM=index_form, INDEX_TYPE=_type(index_pages),
        INDEX_Q_FORM=index_q_form, INDEX_Q_TYPE=_type(index_q), Q_FORM=q_form, Q_TYPE=_type(q),
        BLOCK=BLOCK, VECTORS=max(_VECTORS, others), PORTABLE=triton.knobs.runtime.interpret,
        num_warps=_WARPS, enable_fp_fusion=False,
    )  # fmt: skip
    return out


def _type(data: Tensor) -> tl.dtype:
    return _TRITON_TYPES.get(data.dtype, tl.uint8)


@triton.jit
def _inverse_root(x):
    """1 / sqrt(x) of float64, rounded to float32: two steps of Newton from float32's estimate."""
    finite = tl.where(x == float("inf"), 1.0, x)
    root = tl.rsqrt(finite.to(tl.float32)).to(tl.float64)
    root = root * (1.5 - 0.5 * finite * root * root)
    root = root * (1.5 - 0.5 * finite * root * root)
    return tl.where(x == float("inf"), 0.0, root).to(tl.float32)


@triton.jit
def _rotated(
    a, b, c, weights, a_column, turns, c_column, stays, cosine, sine,
    DIM: tl.constexpr, EPS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Norm, then rope: the three parts of each vector, float32. weights: where each vector's weights begin."""
    # In float64 the sum does not depend on its order, so every device and tile size rounds to the same float32.
    squares = tl.sum((a * a).to(tl.float64), axis=1) + tl.sum((b * b).to(tl.float64), axis=1)
    squares += tl.sum((c * c).to(tl.float64), axis=1)
    inverse = _inverse_root(squares / DIM + tl.full(squares.shape, EPS, tl.float64))[:, None]
    w = weights[:, None]
    x = a * inverse * (1.0 + tl.load(w + a_column[None, :], mask=turns[None, :], other=0.0).to(tl.float32))
    y = b * inverse * (1.0 + tl.load(w + HALF + a_column[None, :], mask=turns[None, :], other=0.0).to(tl.float32))
    z = c * inverse * (1.0 + tl.load(w + c_column[None, :], mask=stays[None, :], other=0.0).to(tl.float32))
    return x * cosine - y * sine, y * cosine + x * sine, z


@triton.jit
def _store_others(
    y, scale, column, wanted, kind, index_q_at, kv_at, index_at, stores,
    INDEX: tl.constexpr, SCALED: tl.constexpr, KV_FORM: tl.constexpr, KV_TYPE: tl.constexpr,
    INDEX_FORM: tl.constexpr, INDEX_TYPE: tl.constexpr, INDEX_Q_FORM: tl.constexpr, INDEX_Q_TYPE: tl.constexpr,
    PORTABLE: tl.constexpr,
):  # fmt: skip
    """Some columns of heads of several kinds, each to where its kind goes. Scales of heads that have none are 1."""
    c, w = column[None, :], wanted[None, :]
    if SCALED:
        y = tl.div_rn(y, tl.broadcast_to(scale[:, None], y.shape))
    kv = round_once(y, KV_FORM, KV_TYPE, PORTABLE)
    is_kv = (kind == 1) | (kind == 2)
    tl.store(kv_at[:, None] + c, kv, mask=(is_kv & stores)[:, None] & w)
    if INDEX:
        same: tl.constexpr = INDEX_FORM == KV_FORM and INDEX_TYPE == KV_TYPE
        kept = kv if same else round_once(y, INDEX_FORM, INDEX_TYPE, PORTABLE)
        tl.store(index_at[:, None] + c, kept, mask=((kind == 4) & stores)[:, None] & w)
        asks_same: tl.constexpr = INDEX_FORM == INDEX_Q_FORM and INDEX_TYPE == INDEX_Q_TYPE
        asked = kept if asks_same else round_once(y, INDEX_Q_FORM, INDEX_Q_TYPE, PORTABLE)
        tl.store(index_q_at[:, None] + c, asked, mask=(kind == 3)[:, None] & w)


@triton.jit(do_not_specialize=["num_rows", "other_programs"])
def _kv_store(
    packed, q_weight, k_weight, index_q_weight, index_k_weight, slots, cos, sin,
    q, index_q, k, v, k_scale, v_scale, index_k,
    num_rows, other_programs, packed_row, packed_head, table_row, q_row, q_head, iq_row, iq_head,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token, i_page, i_token,
    HEADS_Q: tl.constexpr, HEADS_KV: tl.constexpr, HEADS_INDEX: tl.constexpr, OTHERS: tl.constexpr,
    OTHERS_P: tl.constexpr, DIM: tl.constexpr, EPS: tl.constexpr, INDEX: tl.constexpr, SCALED: tl.constexpr,
    HALF: tl.constexpr, HALF_P: tl.constexpr, REST: tl.constexpr, REST_P: tl.constexpr,
    KV_FORM: tl.constexpr, KV_TYPE: tl.constexpr, KV_MAX: tl.constexpr, INDEX_FORM: tl.constexpr,
    INDEX_TYPE: tl.constexpr, INDEX_Q_FORM: tl.constexpr, INDEX_Q_TYPE: tl.constexpr, Q_FORM: tl.constexpr,
    Q_TYPE: tl.constexpr, BLOCK: tl.constexpr, VECTORS: tl.constexpr, PORTABLE: tl.constexpr,
):  # fmt: skip
    """Some vectors: heads of q, or, in the first programs, all other heads of some rows.

    Columns go in three parts: the two that rotate against each other, and the rest.
    """
    nth = tl.arange(0, VECTORS)
    a_column = tl.arange(0, HALF_P)
    turns = a_column < HALF
    c_column = 2 * HALF + tl.arange(0, REST_P)
    stays = c_column < 2 * HALF + REST
    if tl.program_id(0) >= other_programs:
        vector = (tl.program_id(0) - other_programs).to(tl.int64) * VECTORS + nth
        row, head = vector // HEADS_Q, vector % HEADS_Q
        exists = row < num_rows
        wanted = exists[:, None]
        at = packed + (row * packed_row + head * packed_head)[:, None]
        a = tl.load(at + a_column[None, :], mask=wanted & turns[None, :], other=0.0).to(tl.float32)
        b = tl.load(at + HALF + a_column[None, :], mask=wanted & turns[None, :], other=0.0).to(tl.float32)
        c = tl.load(at + c_column[None, :], mask=wanted & stays[None, :], other=0.0).to(tl.float32)
        turned = (row * table_row)[:, None] + a_column[None, :]
        cosine = tl.load(cos + turned, mask=wanted & turns[None, :], other=0.0)
        sine = tl.load(sin + turned, mask=wanted & turns[None, :], other=0.0)
        weights = q_weight + tl.zeros([VECTORS], tl.int32)
        a, b, c = _rotated(a, b, c, weights, a_column, turns, c_column, stays, cosine, sine, DIM, EPS, HALF)
        to = q + (row * q_row + head * q_head)[:, None]
        tl.store(to + a_column[None, :], round_once(a, Q_FORM, Q_TYPE, PORTABLE), mask=wanted & turns[None, :])
        tl.store(to + HALF + a_column[None, :], round_once(b, Q_FORM, Q_TYPE, PORTABLE), mask=wanted & turns[None, :])
        tl.store(to + c_column[None, :], round_once(c, Q_FORM, Q_TYPE, PORTABLE), mask=wanted & stays[None, :])
    else:
        row = tl.program_id(0).to(tl.int64) * (VECTORS // OTHERS_P) + nth // OTHERS_P
        head = (nth % OTHERS_P).to(tl.int64)  # behind q's
        # 1: k, 2: v, 3: index_q, 4: index_k, 5: nothing that this layer wants
        kind = 1 + (head >= HEADS_KV).to(tl.int32) + (head >= 2 * HEADS_KV).to(tl.int32)
        kind += (head == OTHERS - 1).to(tl.int32) * (HEADS_INDEX > 0)
        kind = tl.where((head >= OTHERS) | (row >= num_rows) | ((kind >= 3) & (not INDEX)), 5, kind)
        wanted = (kind < 5)[:, None]
        at = packed + (row * packed_row + (HEADS_Q + head) * packed_head)[:, None]
        a = tl.load(at + a_column[None, :], mask=wanted & turns[None, :], other=0.0).to(tl.float32)
        b = tl.load(at + HALF + a_column[None, :], mask=wanted & turns[None, :], other=0.0).to(tl.float32)
        c = tl.load(at + c_column[None, :], mask=wanted & stays[None, :], other=0.0).to(tl.float32)
        turned = (row * table_row)[:, None] + a_column[None, :]
        cosine = tl.load(cos + turned, mask=wanted & turns[None, :], other=0.0)
        sine = tl.load(sin + turned, mask=wanted & turns[None, :], other=0.0)
        weights = tl.where(kind == 3, index_q_weight, tl.where(kind == 4, index_k_weight, k_weight))
        x, y, z = _rotated(a, b, c, weights, a_column, turns, c_column, stays, cosine, sine, DIM, EPS, HALF)
        plain = (kind == 2)[:, None]
        a, b, c = tl.where(plain, a, x), tl.where(plain, b, y), tl.where(plain, c, z)
        slot = tl.load(slots + row, mask=row < num_rows, other=-1)
        stores = slot >= 0
        page, offset = slot // BLOCK, slot % BLOCK
        kv_head = head % HEADS_KV
        is_k = kind == 1
        kv_at = tl.where(
            is_k, k + page * k_page + kv_head * k_head + offset * k_token,
            v + page * v_page + kv_head * v_head + offset * v_token,
        )  # fmt: skip
        index_at = index_k + page * i_page + offset * i_token
        index_q_at = index_q + row * iq_row + (head - 2 * HEADS_KV) * iq_head
        scale = tl.full([VECTORS], 1.0, tl.float32)
        if SCALED:
            largest = tl.maximum(tl.max(magnitude_bits(a), axis=1), tl.max(magnitude_bits(b), axis=1))
            largest = tl.maximum(largest, tl.max(magnitude_bits(c), axis=1))
            is_kv = (kind == 1) | (kind == 2)
            scale = token_scale(largest, is_kv, KV_FORM, KV_MAX)
            s_at = page * s_page + kv_head * s_head + offset * s_token
            tl.store(tl.where(is_k, k_scale + s_at, v_scale + s_at), scale, mask=is_kv & stores)
        _store_others(
            a, scale, a_column, turns, kind, index_q_at, kv_at, index_at, stores, INDEX, SCALED, KV_FORM,
            KV_TYPE, INDEX_FORM, INDEX_TYPE, INDEX_Q_FORM, INDEX_Q_TYPE, PORTABLE,
        )  # fmt: skip
        _store_others(
            b, scale, HALF + a_column, turns, kind, index_q_at, kv_at, index_at, stores, INDEX, SCALED, KV_FORM,
            KV_TYPE, INDEX_FORM, INDEX_TYPE, INDEX_Q_FORM, INDEX_Q_TYPE, PORTABLE,
        )  # fmt: skip
        _store_others(
            c, scale, c_column, stays, kind, index_q_at, kv_at, index_at, stores, INDEX, SCALED, KV_FORM,
            KV_TYPE, INDEX_FORM, INDEX_TYPE, INDEX_Q_FORM, INDEX_Q_TYPE, PORTABLE,
        )  # fmt: skip
