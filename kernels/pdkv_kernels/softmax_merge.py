"""Put partial softmax results together: what programs that shared the keys of one row have found."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.launch import chained, launch_options


@dataclass(frozen=True)
class Parts:
    """Views into a workspace. A part without keys has lse -inf and whatever is finite in out."""

    out: Tensor  # [splits, num_rows, num_heads, dim], each normalised by itself
    lse: Tensor  # float32 [splits, num_rows, num_heads], base 2


class MergeWorkspace:
    """Partial results between two launches, for rows and heads of the shape of ``q`` and up to so many splits.

    They are in q's dtype: each is a mean of V, rounded as the output will be. One workspace serves all layers, one
    after another on one stream. It never needs clearing.
    """

    def __init__(self, q: Tensor, splits: int) -> None:
        self._out = torch.empty(splits, *q.shape, dtype=q.dtype, device=q.device)
        self._lse = torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=q.device)

    def parts(self, splits: int) -> Parts:
        """The first ``splits`` parts."""
        assert splits <= self._lse.shape[0], (splits, self._lse.shape)
        return Parts(self._out[:splits], self._lse[:splits])


def merge_parts(out: Tensor, lse: Tensor, parts: Parts, late: bool) -> None:
    """Write the weighted mean of the parts to out [num_rows, num_heads, dim] and lse [num_rows, num_heads], base e.

    What follows may start at the end if ``late``, otherwise before the parts are there. Successors that start while
    programs still run crowd on the multiprocessors that are free at that time, some of them taking two where others
    have none, which may cost more than their launch.
    """
    num_rows, num_heads, dim = out.shape
    early = chained()
    splits = parts.lse.shape[0]
    _merge_kernel[(num_rows, num_heads)](
        parts.out,
        parts.lse,
        out,
        lse,
        *parts.out.stride()[:3],
        *parts.lse.stride(),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        lse.stride(1),
        SPLITS=splits,
        SPLIT_TILE=triton.next_power_of_2(splits),
        DIM=dim,
        EARLY=early,
        AT_ONCE=not late,
        **launch_options(early, 1 if splits * dim <= 512 else 4, 1),
    )


@triton.jit
def _merge_kernel(
    parts_ptr,
    parts_lse_ptr,
    out_ptr,
    lse_ptr,
    parts_split_stride,
    parts_row_stride,
    parts_head_stride,
    parts_lse_split_stride,
    parts_lse_row_stride,
    parts_lse_head_stride,
    out_row_stride,
    out_head_stride,
    lse_row_stride,
    lse_head_stride,
    SPLITS: tl.constexpr,
    SPLIT_TILE: tl.constexpr,
    DIM: tl.constexpr,
    EARLY: tl.constexpr,
    AT_ONCE: tl.constexpr,  # successors may start before the wait, otherwise at the end
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    split = tl.arange(0, SPLIT_TILE)
    dims = tl.arange(0, DIM)
    if EARLY:
        if AT_ONCE:
            tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    parts_lse_at = parts_lse_ptr + row * parts_lse_row_stride + head * parts_lse_head_stride
    logs = tl.load(parts_lse_at + split * parts_lse_split_stride, mask=split < SPLITS, other=float("-inf"))
    parts_at = parts_ptr + row * parts_row_stride + head * parts_head_stride + dims[None, :]
    parts = tl.load(
        parts_at + split[:, None].to(tl.int64) * parts_split_stride, mask=split[:, None] < SPLITS, other=0.0
    ).to(tl.float32)  # [SPLIT_TILE, DIM]
    top = tl.maximum(tl.max(logs, axis=0), -1.0e38)
    weights = tl.exp2(logs - top)
    total = tl.sum(weights, axis=0)
    empty = total == 0.0
    merged = tl.sum(parts * weights[:, None], axis=0) / tl.where(empty, 1.0, total)
    tl.store(out_ptr + row * out_row_stride + head * out_head_stride + dims, merged.to(out_ptr.dtype.element_ty))
    if EARLY and not AT_ONCE:
        tl.extra.cuda.gdc_launch_dependents()
    log_sum = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    tl.store(lse_ptr + row * lse_row_stride + head * lse_head_stride, log_sum)
