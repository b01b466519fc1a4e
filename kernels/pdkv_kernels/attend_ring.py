"""Attention of decode rows to selected blocks by programs that fill the machine once: a ring of tiles that never rests.

A group is a row and a kv head. A program that ends with its group leaves the memory idle for it twice: while its
results are put together, and while the next one is on its way to its first tile. Here each program takes several groups
one behind another, and all their tiles of K and V pass through one ring in shared memory: those of the next group are
on their way while a group's results are put together. One request brings a tile, so no thread spends time on addresses.

Every warp has a part of each tile's tokens and a running softmax of its own; what they have found is put together at
the end of a group alone. With a program of one warp there is nothing to put together, so where there are groups enough,
programs are of one warp. For bf16 on Hopper; ``sparse_attention_decode`` has a kernel for everything else.
"""

from dataclasses import dataclass

import torch
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.hardware import hardware
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.ring_layout import in_every_warp

_DIM = 128
_HEADS = 16
"""Query heads of a kv head at most: rows of a matrix product."""
_PLACES = gl.constexpr(32)
"""Blocks of a group at most: one a lane of a warp."""
_FURTHEST = 1 << 31
"""Lines of ``_DIM`` numbers that a request for a tile can count."""
_OUTSIDE = gl.constexpr(-65536)
"""A line that is not there: what is asked for from it on is zeros, and reads no memory."""


@dataclass(frozen=True)
class RingPlan:
    """How groups are shared out, and how their tiles travel."""

    warps: int
    tile: int  # tokens of a request, of K or of V: 16 a warp at least
    slots: int  # tiles of K or V in shared memory; an even number of them where there are several warps
    rounds: int = 1  # groups of a program

    def __post_init__(self) -> None:
        assert self.tile >= 16 * self.warps, self
        assert self.slots >= 2, self
        assert self.slots % 2 == 0 or self.warps == 1, self


def ring_fits(q: Tensor, kv: PagedKv, batch: DecodeBatch, topk: int) -> bool:
    """Whether ``attend_by_ring`` takes this batch. It needs Hopper, bf16, M3's dimension and one query row a sequence.

    A head's K and V of a page must be one run of bytes each, whole lines of it apart, so that one request brings a
    tile.
    """
    page, head, line, _ = kv.k.stride()
    return (
        chained()
        and hardware().capability < 100
        and q.dtype == kv.k.dtype == kv.v.dtype == torch.bfloat16
        and kv.k_scale is None
        and kv.v_scale is None
        and batch.query_len == 1
        and line == q.shape[2] == _DIM
        and kv.v.stride() == kv.k.stride()
        and page % _DIM == head % _DIM == 0
        and kv.k.data_ptr() % 16 == kv.v.data_ptr() % 16 == 0
        and (kv.k.shape[0] * page + kv.k.shape[1] * head) // _DIM < _FURTHEST
        and q.shape[1] <= _HEADS * kv.k.shape[1]
        and topk <= _PLACES.value
    )


def attend_by_ring(
    result: tuple[Tensor, Tensor],
    q: Tensor,
    kv: PagedKv,
    blocks: Tensor,
    batch: DecodeBatch,
    scale: float,
    plan: RingPlan,
) -> None:
    """``sparse_attention_decode_into`` where ``ring_fits``; result: its out and lse."""
    out, lse = result
    rows, heads, dim = q.shape
    kv_heads, topk = blocks.shape[1:]
    groups = rows * kv_heads
    page_lines, head_lines = kv.k.stride(0) // dim, kv.k.stride(1) // dim
    lines = (kv.k.shape[0] - 1) * page_lines + (kv_heads - 1) * head_lines + BLOCK
    box = [plan.tile, dim]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    k_tiles, v_tiles = (TensorDescriptor(t, [lines, dim], [dim, 1], box, layout) for t in (kv.k, kv.v))
    _attend_kernel[(-(-groups // plan.rounds),)](
        q,
        k_tiles,
        v_tiles,
        blocks,
        batch.page_table,
        batch.seq_lens,
        out,
        lse,
        scale * 1.4426950408889634,
        groups,
        plan.rounds,
        kv_heads,
        page_lines,
        head_lines,
        q.stride(0),
        q.stride(1),
        *blocks.stride(),
        batch.page_table.stride(0),
        out.stride(0),
        out.stride(1),
        lse.stride(0),
        lse.stride(1),
        SHARE=heads // kv_heads,
        HEADS=_HEADS,
        DIM=dim,
        TOPK=topk,
        TOKENS=BLOCK,
        TILE=plan.tile,
        SLOTS=plan.slots,
        WARPS=plan.warps,
        SEVERAL=plan.rounds > 1,
        **launch_options(early=True, num_warps=plan.warps, num_stages=1),
    )


@gluon.jit(do_not_specialize=["groups", "rounds", "kv_heads", "page_lines", "head_lines", "table_stride"])
def _attend_kernel(
    q_ptr,  # [num_rows, num_heads, DIM]
    k_tiles,  # descriptor of all lines of DIM numbers from the first page's first to the last page's last
    v_tiles,
    blocks_ptr,  # int32 [num_rows, kv_heads, TOPK]
    page_table_ptr,  # int32 [num_rows, max_blocks]
    seq_lens_ptr,  # int32 [num_rows]
    out_ptr,  # [num_rows, num_heads, DIM]
    lse_ptr,  # float32 [num_rows, num_heads]
    scale,  # of the logits, times log2(e)
    groups,
    rounds,  # groups of a program: program, program + programs, ...
    kv_heads,
    page_lines,  # from one page's first line to the next page's
    head_lines,
    q_row_stride,
    q_head_stride,
    blocks_row_stride,
    blocks_head_stride,
    blocks_place_stride,
    table_stride,
    out_row_stride,
    out_head_stride,
    lse_row_stride,
    lse_head_stride,
    SHARE: gl.constexpr,
    HEADS: gl.constexpr,
    DIM: gl.constexpr,
    TOPK: gl.constexpr,
    TOKENS: gl.constexpr,
    TILE: gl.constexpr,
    SLOTS: gl.constexpr,
    WARPS: gl.constexpr,
    SEVERAL: gl.constexpr,  # rounds
):
    PIECES: gl.constexpr = TOKENS // TILE
    PART: gl.constexpr = TILE // WARPS  # tokens of a warp
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1, 1], [1, 16, 8])  # [WARPS, HEADS, ...]
    A_SIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    B_SIDE: gl.constexpr = gl.DotOperandLayout(1, SUMS, 2)
    ROWS: gl.constexpr = gl.SliceLayout(2, SUMS)  # [WARPS, HEADS]
    POOL: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 8, [2, 1, 0])  # of float32 [WARPS, HEADS, DIM]
    WIDE: gl.constexpr = gl.BlockedLayout([WARPS, 1, 4], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    group = gl.program_id(0)
    ring = gl.allocate_shared_memory(k_tiles.dtype, [SLOTS, TILE, DIM], k_tiles.layout)
    arrivals = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(SLOTS):
        mbarrier.init(arrivals.index(slot), count=1)
    nth = gl.arange(0, _PLACES, in_every_warp(_PLACES, WARPS))
    token = _tokens(SUMS, PART, WARPS)[:, None, :]  # [WARPS, 1, PART]
    tl.extra.cuda.gdc_wait()
    lines, lefts, count = _look_up(
        group, nth, groups, kv_heads, page_lines, head_lines, blocks_ptr, page_table_ptr, seq_lens_ptr,
        blocks_row_stride, blocks_head_stride, blocks_place_stride, table_stride, TOPK, TOKENS, PIECES, SLOTS,
    )  # fmt: skip
    for request in gl.static_range(SLOTS):
        _ask_ahead(
            request // 2, nth, (lines, lefts, count), (lines, lefts), False,
            k_tiles if request % 2 == 0 else v_tiles, arrivals.index(request), ring.index(request), PIECES, TILE,
        )  # fmt: skip
    slot = 0
    phase = 0
    turns = rounds if SEVERAL else 1
    for turn in range(turns):
        after = group + gl.num_programs(0)
        is_last = (turn == turns - 1) | (after >= groups)
        if SEVERAL:
            lines_after, lefts_after, count_after = _look_up(
                after, nth, groups, kv_heads, page_lines, head_lines, blocks_ptr, page_table_ptr, seq_lens_ptr,
                blocks_row_stride, blocks_head_stride, blocks_place_stride, table_stride, TOPK, TOKENS, PIECES, SLOTS,
            )  # fmt: skip
        else:
            lines_after, lefts_after, count_after = lines, lefts, count
        row = group // kv_heads
        kv_head = group % kv_heads
        q = _queries(q_ptr + row.to(gl.int64) * q_row_stride + kv_head * SHARE * q_head_stride, q_head_stride,
                     group < groups, SHARE, A_SIDE, WARPS, HEADS, DIM)  # fmt: skip
        # A finite floor instead of -inf: the difference of two of them is 0, not NaN.
        top = gl.full([WARPS, HEADS], -1.0e38, gl.float32, ROWS)
        total = gl.zeros([WARPS, HEADS, PART], gl.float32, SUMS)
        sums = gl.zeros([WARPS, HEADS, DIM], gl.float32, SUMS)
        count = gl.where(group < groups, count, 0)
        for step in range(count):
            left = gl.sum(gl.where(nth == step // PIECES, lefts, 0), axis=0) - step % PIECES * TILE
            # With several warps a group's last two slots take what they have found, before they are asked for anew.
            free = (step != count - 1) if WARPS > 1 else True
            mbarrier.wait(arrivals.index(slot), phase)
            k = ring.index(slot).reshape([WARPS, PART, DIM]).permute([0, 2, 1]).load(B_SIDE)
            # All warps have read the tile; its place is for the one that comes SLOTS later.
            tl.debug_barrier()
            _ask_ahead(
                step + SLOTS // 2, nth, (lines, lefts, count), (lines_after, lefts_after), (is_last == 0) & free,
                v_tiles if SLOTS % 2 else k_tiles, arrivals.index(slot), ring.index(slot), PIECES, TILE,
            )  # fmt: skip
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
            logits = mma_v2(q, k, gl.zeros([WARPS, HEADS, PART], gl.float32, SUMS)) * scale
            logits = gl.where(token < left, logits, float("-inf"))
            new_top = gl.maximum(top, gl.max(logits, axis=2))
            weights = gl.exp2(logits - new_top[:, :, None])
            fade = gl.exp2(top - new_top)
            top = new_top
            total = total * fade[:, :, None] + weights
            sums = sums * fade[:, :, None]
            mbarrier.wait(arrivals.index(slot), phase)
            if (left > 0) & (left < TILE):
                _clear_end(ring.index(slot).reshape([TILE, DIM]), left, TILE, DIM, WARPS)
            v = ring.index(slot).reshape([WARPS, PART, DIM]).load(B_SIDE)
            tl.debug_barrier()
            _ask_ahead(
                step + (SLOTS + 1) // 2, nth, (lines, lefts, count), (lines_after, lefts_after), (is_last == 0) & free,
                k_tiles if SLOTS % 2 else v_tiles, arrivals.index(slot), ring.index(slot), PIECES, TILE,
            )  # fmt: skip
            slot += 1
            if slot == SLOTS:
                slot = 0
                phase ^= 1
            sums = mma_v2(gl.convert_layout(weights.to(v.dtype), A_SIDE), v, sums)
        if is_last:
            tl.extra.cuda.gdc_launch_dependents()
        if group < groups:
            share, log_sum = _shares(top, total)
            head = gl.arange(0, HEADS, gl.SliceLayout(0, ROWS))
            lse_at = lse_ptr + row.to(gl.int64) * lse_row_stride + kv_head * SHARE * lse_head_stride
            gl.store(lse_at + head * lse_head_stride, log_sum, mask=head < SHARE)
            out_at = out_ptr + row.to(gl.int64) * out_row_stride + kv_head * SHARE * out_head_stride
            if WARPS == 1:
                _store(gl.sum(sums * share[:, :, None], axis=0), out_at, out_head_stride, SHARE, HEADS, DIM)
            else:
                # The ring's two slots in front, which nothing is on its way to.
                pair = gl.where(slot == 0, SLOTS, slot) // 2 - 1
                pool = ring._reinterpret(gl.float32, [SLOTS // 2, TILE // 16, HEADS, DIM], POOL).index(pair)
                if TILE // 16 > WARPS:
                    pool = pool.slice(0, WARPS)
                pool.store(sums * share[:, :, None])
                tl.debug_barrier()
                found = gl.sum(pool.load(WIDE), axis=0)
                if SEVERAL:
                    fence_async_shared()
                    tl.debug_barrier()
                    for request in gl.static_range(2):
                        _ask_ahead(
                            count - 1 + SLOTS // 2, nth, (lines, lefts, count), (lines_after, lefts_after),
                            is_last == 0, k_tiles if request == 0 else v_tiles, arrivals.index(2 * pair + request),
                            ring.index(2 * pair + request), PIECES, TILE,
                        )  # fmt: skip
                _store(found, out_at, out_head_stride, SHARE, HEADS, DIM)
        group = after
        lines, lefts, count = lines_after, lefts_after, count_after


@gluon.jit
def _tokens(SUMS: gl.constexpr, PART: gl.constexpr, WARPS: gl.constexpr):
    """Numbers of a tile's tokens, as the logits have them: int32 [WARPS, PART]."""
    HERE: gl.constexpr = gl.SliceLayout(1, SUMS)
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, HERE))
    token = gl.arange(0, PART, gl.SliceLayout(0, HERE))
    return warp[:, None] * PART + token[None, :]


@gluon.jit
def _look_up(
    group, nth, groups, kv_heads, page_lines, head_lines, blocks_ptr, page_table_ptr, seq_lens_ptr,
    blocks_row_stride, blocks_head_stride, blocks_place_stride, table_stride, TOPK: gl.constexpr, TOKENS: gl.constexpr,
    PIECES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Of the group's blocks: first lines, tokens visible from each one's first on (0: none); steps up to the last."""
    row = group // kv_heads
    kv_head = group % kv_heads
    real = group < groups
    visible = gl.load(seq_lens_ptr + row, mask=real, other=0)
    chosen_at = blocks_ptr + row.to(gl.int64) * blocks_row_stride + kv_head * blocks_head_stride
    block = gl.load(chosen_at + nth * blocks_place_stride, mask=(nth < TOPK) & real, other=-1)
    live = (block >= 0) & (block < (visible + TOKENS - 1) // TOKENS)
    page = gl.load(page_table_ptr + row.to(gl.int64) * table_stride + block, mask=live, other=0)
    # So many steps at least that no tile is asked for two groups ahead.
    count = gl.maximum(gl.max(gl.where(live, nth + 1, 0), axis=0) * PIECES, (SLOTS + 1) // 2)
    return page * page_lines + kv_head * head_lines, gl.where(live, visible - block * TOKENS, 0), count


@gluon.jit
def _queries(
    q_at, head_stride, real, SHARE: gl.constexpr, SIDE: gl.constexpr, WARPS: gl.constexpr, HEADS: gl.constexpr,
    DIM: gl.constexpr,
):  # fmt: skip
    """[WARPS, HEADS, DIM], the same in each warp."""
    warp = gl.arange(0, WARPS, gl.SliceLayout(1, gl.SliceLayout(2, SIDE)))
    head = gl.arange(0, HEADS, gl.SliceLayout(0, gl.SliceLayout(2, SIDE)))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, gl.SliceLayout(1, SIDE)))
    at = (warp[:, None] * 0 + head[None, :] * head_stride)[:, :, None] + dim[None, :][:, None, :]
    return gl.load(q_at + at, mask=(head[None, :] < SHARE)[:, :, None] & real & (at >= 0), other=0.0)


@gluon.jit
def _ask_ahead(step, nth, here, after, more, tiles, arrival, place, PIECES: gl.constexpr, TILE: gl.constexpr):
    """Ask for the tile of this step of the group, or of the group after it, if there are more.

    Where nothing is to be seen of a tile, one is asked for that lies outside.
    """
    lines, lefts, count = here
    lines_after, lefts_after = after
    is_here = step < count
    lines = gl.where(is_here, lines, lines_after)
    lefts = gl.where(is_here, lefts, lefts_after)
    wanted = is_here | more
    step = gl.where(is_here, step, step - count)
    left = gl.sum(gl.where(nth == step // PIECES, lefts, 0), axis=0) - step % PIECES * TILE
    line = gl.sum(gl.where(nth == step // PIECES, lines, 0), axis=0) + step % PIECES * TILE
    line = gl.where(left > 0, line, _OUTSIDE)
    mbarrier.expect(arrival, TILE * 256, pred=wanted)
    tma.async_copy_global_to_shared(tiles, [line, 0], arrival, place, pred=wanted)


@gluon.jit
def _clear_end(tile, left, TILE: gl.constexpr, DIM: gl.constexpr, WARPS: gl.constexpr):
    """What lies behind the last token may be NaN, and 0 times that is not 0."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [WARPS, 1], [1, 0])
    token = gl.arange(0, TILE, gl.SliceLayout(1, LINES))
    numbers = tile.load(LINES)
    tl.debug_barrier()
    tile.store(gl.where((token < left)[:, None], numbers, gl.zeros([TILE, DIM], numbers.dtype, LINES)))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _shares(top, total):
    """What each warp's sums count for in the output, [WARPS, HEADS], and the log of the softmax's sum, [HEADS]."""
    best = gl.max(top, axis=0)
    fade = gl.exp2(top - best[None, :])
    weight = gl.sum(gl.sum(total, axis=2) * fade, axis=0)
    empty = weight == 0.0
    weight = gl.where(empty, 1.0, weight)
    log_sum = gl.where(empty, float("-inf"), (best + gl.log2(weight)) * 0.6931471805599453)
    return fade / weight[None, :], log_sum


@gluon.jit
def _store(found, out_at, out_head_stride, SHARE: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr):
    HERE: gl.constexpr = found.type.layout
    head = gl.arange(0, HEADS, gl.SliceLayout(1, HERE))
    dim = gl.arange(0, DIM, gl.SliceLayout(0, HERE))
    at = out_at + head[:, None] * out_head_stride + dim[None, :]
    gl.store(at, found.to(gl.bfloat16), mask=(head[:, None] < SHARE) & (dim[None, :] < DIM))
