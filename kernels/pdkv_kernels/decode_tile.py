"""One tile of keys and values under a running softmax: query heads are the rows of both products.

fp8 keys and values are widened to float16, exactly, on their way into the matrix units. Values may come as pairs of
bytes, two dimensions each; then the sums of even and of odd dimensions are kept apart until the end.
"""

import triton
import triton.language as tl

from pdkv_kernels.fp8_bits import half_of_bits, half_of_pairs


@triton.jit
def prepare_q(q, K_TYPE: tl.constexpr, CODE: tl.constexpr):
    """q [heads, DIM] in the type of the product with K, and what its dots are in units of: float32 [heads].

    For fp8 keys each head is divided by a power of two, which loses nothing, so that it fits float16.
    """
    if CODE == 0:
        return q.to(K_TYPE), tl.full((q.shape[0],), 1.0, tl.float32)
    else:
        wide = q.to(tl.float32)
        largest = tl.maximum(tl.max(tl.abs(wide), axis=1), 1.0e-30)
        exponent = tl.ceil(tl.log2(largest))
        return (wide * tl.exp2(-exponent)[:, None]).to(tl.float16), tl.exp2(exponent)


@triton.jit
def attend_tile(
    q,  # from prepare_q
    unit,  # float32 [heads], what a dot must be multiplied by
    k,  # [TILE, DIM]
    v,  # [TILE, DIM], or pairs, [TILE, DIM / 2]
    k_scale,  # float32 [TILE]
    v_scale,  # float32 [TILE]
    mask,  # [heads or 1, TILE]
    top,  # float32 [heads]
    total,  # float32 [heads, TILE], summed up over TILE at the end alone
    sums,  # float32 [heads, DIM], or of even dimensions, [heads, DIM / 2]
    odds,  # float32 [heads, DIM / 2] of odd dimensions; without pairs not touched
    CODE: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALED: tl.constexpr,
):
    """The new (top, total, sums, odds).

    V's scales ride in the exponent, by their own: with v_scale = mantissa * 2^e the weight is 2^(s + e - top) times the
    mantissa, at most 2 however scales differ, and the softmax's sum gets 2^(s + e - top) * 2^-e.
    """
    dots = tl.dot(q, tl.trans(half_of_bits(k, CODE)), input_precision="ieee")  # [heads, TILE]
    logits = dots * unit[:, None]
    if SCALED:
        exponent = (v_scale.to(tl.int32, bitcast=True) >> 23) & 0xFF
        logits = logits * k_scale[None, :] + (exponent - 127).to(tl.float32)[None, :]
    logits = tl.where(mask, logits, float("-inf"))
    new_top = tl.maximum(top, tl.max(logits, axis=1))
    weights = tl.exp2(logits - new_top[:, None])
    fade = tl.exp2(top - new_top)
    if SCALED:
        inverse = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
        total = total * fade[:, None] + weights * inverse[None, :]
        weights = weights * (v_scale * inverse)[None, :]
    else:
        total = total * fade[:, None] + weights
    if PAIRS == 0:
        v = half_of_bits(v, CODE)
        sums = tl.dot(weights.to(v.dtype), v, acc=sums * fade[:, None], input_precision="ieee")
    else:
        weights = weights.to(tl.float16)
        sums = tl.dot(weights, half_of_pairs(v, False, PAIRS), acc=sums * fade[:, None])
        odds = tl.dot(weights, half_of_pairs(v, True, PAIRS), acc=odds * fade[:, None])
    return new_top, total, sums, odds


@triton.jit
def finish(top, total, sums, odds, PAIRS: tl.constexpr):
    """Output [heads, DIM] and the log of the softmax's sum in base 2 [heads]; 0 and -inf where nothing was seen."""
    if PAIRS != 0:
        sums = tl.reshape(tl.join(sums, odds), (sums.shape[0], 2 * sums.shape[1]))
    total = tl.sum(total, axis=1)
    empty = total == 0.0
    result = sums / tl.where(empty, 1.0, total)[:, None]
    return result, tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
