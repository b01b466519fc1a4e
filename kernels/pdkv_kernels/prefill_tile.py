"""One step of a tile of query rows over some keys of a page: what sparse and dense prefill share."""

import triton
import triton.language as tl

from pdkv_kernels.fp8_bits import half_of_bits


@triton.jit
def split_rows(q, scale, SPLIT_Q: tl.constexpr):
    """q as sums of two e4m3 numbers, and by what each row's logits are multiplied; without SPLIT_Q q itself, twice."""
    row_scale = tl.full([q.shape[0]], scale, tl.float32)
    if SPLIT_Q:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), axis=1), 1e-30) / 448.0
        wide = wide / largest[:, None]
        high = wide.to(tl.float8e4nv)
        return high, (wide - high.to(tl.float32)).to(tl.float8e4nv), largest * scale
    else:
        return q, q, row_scale


@triton.jit
def load_scales(k_scale, v_scale, at, s_token, num_keys, KEYS: tl.constexpr):
    """Scales of keys of a page and of their values, two float32 [KEYS]; 0 past num_keys.

    One load for both: the compiler would repeat smaller ones in every thread that needs the column.
    """
    n = tl.arange(0, KEYS)[:, None]
    which = tl.arange(0, 2)[None, :]
    base = tl.where(which == 0, k_scale.to(tl.int64), v_scale.to(tl.int64))
    address = base + (at + n * s_token) * 4
    pair = tl.load(address.to(tl.pointer_type(tl.float32)), mask=(n < num_keys) & (which < 2), other=0.0)
    return tl.split(pair)


@triton.jit
def attend_keys(
    acc, top, total, unit, q, q_high, q_low, row_scale, k_at, v_at, seen, num_keys, k_scale, v_scale, s_at, s_token,
    MASKED: tl.constexpr, SPLIT_Q: tl.constexpr, CODE: tl.constexpr, SCALED: tl.constexpr, VTYPE: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Running softmax of base 2 over KEYS more keys: (acc, top, total, unit), one row each but the last.

    k_at, v_at: pointers [KEYS, dim]. MASKED: only the first num_keys keys are loaded, and each row counts those that
    it has ``seen``, int32 [rows]. acc counts in units of the largest scale of V so far.
    """
    n = tl.arange(0, KEYS)
    there = n < num_keys
    if MASKED:
        k_tile = tl.load(k_at, mask=there[:, None], other=0.0)
    else:
        k_tile = tl.load(k_at)
    if SPLIT_Q:
        keys = tl.trans(k_tile)
        logits = tl.dot(q_high, keys)
        logits = tl.dot(q_low, keys, logits)
    else:
        logits = tl.dot(q, tl.trans(half_of_bits(k_tile, CODE).to(q.dtype)), input_precision="ieee")
    if SCALED:
        key_weight, weight = load_scales(k_scale, v_scale, s_at, s_token, num_keys, KEYS)
        logits *= key_weight[None, :]
    if MASKED:
        logits = tl.where(n[None, :] < seen[:, None], logits, -float("inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1) * row_scale)
    p = tl.exp2(logits * row_scale[:, None] - new_top[:, None])
    fade = tl.exp2(top - new_top)
    total = total * fade + tl.sum(p, axis=1)
    if SCALED:
        new_unit = tl.maximum(unit, tl.max(tl.abs(weight), axis=0))
        p = p * (weight * (1.0 / new_unit))[None, :]
        fade = fade * (unit / new_unit)
        unit = new_unit
    acc = acc * fade[:, None]
    if MASKED:
        v_tile = tl.load(v_at, mask=there[:, None], other=0.0)
    else:
        v_tile = tl.load(v_at)
    acc = tl.dot(p.to(VTYPE), half_of_bits(v_tile, CODE).to(VTYPE), acc, input_precision="ieee")
    return acc, new_top, total, unit
