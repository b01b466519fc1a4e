"""One tile of keys and values under a running softmax, tokens along the tall side of both products."""

import triton
import triton.language as tl

from pdkv_kernels.fp8_bits import half_of_bits


@triton.jit
def prepare_q(q, K_TYPE: tl.constexpr, CODE: tl.constexpr, SPLIT_Q: tl.constexpr):
    """q [heads, DIM] as ``K q`` takes it, [DIM, heads or twice as many], and what its dots are in units of: [heads].

    With fp8 keys each head is divided by a power of two, which loses nothing, so that it fits float16 or, in two
    parts, e4m3: the second part holds what the first rounds off, times 16. Eight bits of mantissa survive, as many as
    bfloat16 has.
    """
    if CODE == 0:
        return tl.trans(q.to(K_TYPE)), tl.full((q.shape[0],), 1.0, tl.float32)
    else:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), axis=1), 1.0e-30)
        unit = tl.exp2(tl.ceil(tl.log2(largest)))
        if SPLIT_Q:
            unit = unit * 0.00390625  # the largest is between 128 and 256, of 448
            wide = wide * (1.0 / unit)[:, None]
            high = wide.to(tl.float8e4nv)
            low = ((wide - high.to(tl.float32)) * 16.0).to(tl.float8e4nv)
            both = tl.permute(tl.join(high, low), (2, 0, 1))  # [2, heads, DIM]
            return tl.trans(tl.reshape(both, (2 * q.shape[0], q.shape[1]))), unit
        else:
            return tl.trans((wide * (1.0 / unit)[:, None]).to(tl.float16)), unit


@triton.jit
def attend_tile(
    q,  # from prepare_q
    unit,  # float32 [heads], what a dot must be multiplied by
    k,  # [TILE, DIM]
    v,  # [TILE, DIM]
    k_scale,  # float32 [TILE]
    v_scale,  # float32 [TILE]
    mask,  # [TILE, heads] or [TILE, 1]
    top,  # float32 [heads]
    total,  # float32 [TILE, heads], summed up over TILE at the end alone
    sums,  # float32 [DIM, heads]
    CODE: tl.constexpr,
    SCALED: tl.constexpr,
    SPLIT_Q: tl.constexpr,
):
    """The new (top, total, sums)."""
    if SPLIT_Q:
        both = tl.dot(k, q)  # [TILE, 2 * heads]
        both = tl.permute(tl.reshape(both, (k.shape[0], 2, q.shape[1] // 2)), (0, 2, 1))
        high, low = tl.split(both)
        dots = high + low * 0.0625
    else:
        dots = tl.dot(half_of_bits(k, CODE), q, input_precision="ieee")
    logits = dots * unit[None, :]
    if SCALED:
        exponent = (v_scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
        logits = logits * k_scale[:, None] + (exponent - 127).to(tl.float32)[:, None]
    logits = tl.where(mask, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=0))
    weights = tl.exp2(logits - new_top[None, :])
    fade = tl.exp2(top - new_top)
    if SCALED:
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        total = total * fade[None, :] + weights * inverse[:, None]
        weights = weights * (v_scale * inverse)[:, None]  # times the mantissa, between 1 and 2
    else:
        total = total * fade[None, :] + weights
    v = half_of_bits(v, CODE)
    sums = tl.dot(tl.trans(v), weights.to(v.dtype), acc=sums * fade[None, :], input_precision="ieee")
    return new_top, total, sums


@triton.jit
def finish(top, total, sums):
    """Output [DIM, heads] and the log of the softmax's sum in base 2 [heads]; 0 and -inf where nothing was seen."""
    total = tl.sum(total, axis=0)
    empty = total == 0.0
    result = sums / tl.where(empty, 1.0, total)[None, :]
    return result, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
