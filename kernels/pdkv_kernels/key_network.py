"""Sorting networks inside Triton kernels: a tuple of tensors is sorted element by element.

Every element of the tensors has a column of keys of its own, one in each tensor. Nothing is shared between elements, so
a thread sorts its columns in registers, without a branch; the interpreter does the same.
"""

import triton
import triton.language as tl


@triton.jit
def sorted_keys(keys, COUNT: tl.constexpr):
    """keys: COUNT tensors, a power of two; largest first. Batcher's odd-even merge sort."""
    if COUNT == 1:
        return keys
    else:
        half: tl.constexpr = COUNT // 2
        return _merged(sorted_keys(keys[:half], half) + sorted_keys(keys[half:], half), COUNT)


@triton.jit
def best_of_both(one, other, COUNT: tl.constexpr):
    """The COUNT largest of twice as many: both tuples sorted, and so is the result."""
    best = one[0:0]
    for nth in tl.static_range(COUNT):
        best = best + (_exchange(one[nth], other[COUNT - 1 - nth])[0],)
    return _bitonic(best, COUNT)


@triton.jit
def _best_of_sixteen(
    a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15,
    b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15,
):  # fmt: skip
    """``best_of_both`` as a reduction wants it."""
    one = (a0, a1, a2, a3, a4, a5, a6, a7, a8, a9, a10, a11, a12, a13, a14, a15)
    other = (b0, b1, b2, b3, b4, b5, b6, b7, b8, b9, b10, b11, b12, b13, b14, b15)
    best = best_of_both(one, other, 16)
    return (best[0], best[1], best[2], best[3], best[4], best[5], best[6], best[7],
            best[8], best[9], best[10], best[11], best[12], best[13], best[14], best[15])  # fmt: skip


@triton.jit
def best_of_parts(keys, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """Sorted columns in PARTS parts each, along the last dimension: the best of each whole, [rows, 1]."""
    if PARTS == 1:
        return keys
    elif COUNT == 16:  # M3's: by shuffles alone
        whole = tl.reduce(keys, 1, _best_of_sixteen)
        columns = keys[0:0]
        for nth in tl.static_range(COUNT):
            columns = columns + (whole[nth][:, None],)
        return columns
    else:
        one = keys[0:0]
        other = keys[0:0]
        for nth in tl.static_range(COUNT):
            left, right = tl.split(tl.reshape(keys[nth], [keys[nth].shape[0], PARTS // 2, 2]))
            one = one + (left,)
            other = other + (right,)
        return best_of_parts(best_of_both(one, other, COUNT), COUNT, PARTS // 2)


@triton.jit
def side_by_side(values, COUNT: tl.constexpr):
    """COUNT tensors [rows, 1] as one [rows, COUNT]."""
    if COUNT == 1:
        return values[0]
    else:
        rows: tl.constexpr = values[0].shape[0]
        even = side_by_side(values[0::2], COUNT // 2)
        odd = side_by_side(values[1::2], COUNT // 2)
        return tl.reshape(tl.join(even, odd), [rows, COUNT])


@triton.jit
def _exchange(a, b):
    more = a > b
    return tl.where(more, a, b), tl.where(more, b, a)


@triton.jit
def _merged(keys, COUNT: tl.constexpr):
    """Both halves are sorted."""
    if COUNT == 2:
        return _exchange(keys[0], keys[1])
    else:
        half: tl.constexpr = COUNT // 2
        even = _merged(keys[0::2], half)
        odd = _merged(keys[1::2], half)
        all_keys = even[0:1]
        for nth in tl.static_range(half - 1):
            all_keys = all_keys + _exchange(odd[nth], even[nth + 1])
        return all_keys + odd[half - 1 :]


@triton.jit
def _bitonic(keys, COUNT: tl.constexpr):
    """keys rise and then fall, or the other way round."""
    if COUNT == 1:
        return keys
    else:
        half: tl.constexpr = COUNT // 2
        upper = keys[0:0]
        lower = keys[0:0]
        for nth in tl.static_range(half):
            a, b = _exchange(keys[nth], keys[nth + half])
            upper = upper + (a,)
            lower = lower + (b,)
        return _bitonic(upper, half) + _bitonic(lower, half)
