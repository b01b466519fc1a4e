"""Sorting networks inside Triton kernels: a tuple of integer tensors is sorted element by element.

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
        best = best + (tl.maximum(one[nth], other[COUNT - 1 - nth]),)
    return _bitonic(best, COUNT)


@triton.jit
def best_of_parts(keys, COUNT: tl.constexpr, PARTS: tl.constexpr):
    """Sorted columns in PARTS parts each, along the last dimension: the best of each whole, [rows, 1]."""
    if PARTS == 1:
        return keys
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
    top = tl.maximum(a, b)
    return top, a ^ b ^ top


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
