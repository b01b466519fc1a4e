"""How numbers lie in the registers of programs that keep a ring of tiles."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def in_every_warp(size, warps):
    """A layout for ``size`` numbers, up to 32, one in each lane of a warp, and the same in all warps."""
    copies: list[list[int]] = []
    while 2 ** len(copies) < warps:
        copies.append([0])
    lanes = [[1], [2], [4], [8], [16]]
    return gl.DistributedLinearLayout([], lanes, copies, [], [size])
