"""What a scan makes of scores: integers that order as scores do, and whose extremes mean what no score can.

NaN is below every number, and in decode's total order equal scores go to the lower block.
"""

import triton
import triton.language as tl

HIDDEN = tl.constexpr(-0x80000000)
NAN = tl.constexpr(-0x7FFFFFFF)
LOCAL = tl.constexpr(0x7FFFFFFE)
INIT = tl.constexpr(0x7FFFFFFF)
"""Keys around those of real scores: -inf is -0x7F800000 and +inf is 0x7F800000."""


@triton.jit
def wide_keys(keys, blocks):
    """Keys that all differ: the ordered score above, and below it the complement of the block, so that low ids win."""
    return (keys.to(tl.int64) << 32) | (0x7FFFFFFF - blocks).to(tl.int64)
