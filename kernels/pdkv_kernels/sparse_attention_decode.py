"""Attention of decode rows to selected blocks, the choice of each row and kv head shared out among programs.

A program takes some of the blocks that one row chose for one kv head, with all query heads of that kv head as the rows
of its tiles (``decode_tile``). Where several share a row and kv head, a second launch puts their results together.
Where rows and kv heads fill the machine by themselves, ``attend_ring`` does it on a Hopper in bf16.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.attend_ring import RingPlan, attend_by_ring, ring_fits
from pdkv_kernels.decode_arguments import page_arguments, result_arguments, tile_stages
from pdkv_kernels.decode_batch import DecodeBatch, uniform_batch
from pdkv_kernels.decode_tile import attend_tile, finish, prepare_q
from pdkv_kernels.fp8_bits import fp8_pairs
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.softmax_merge import MergeWorkspace, merge_parts

_RINGS = (
    (96, 125, RingPlan(4, 64, 6)),
    (126, 132, RingPlan(4, 64, 4)),
    (192, 264, RingPlan(4, 64, 4)),
    (384, 501, RingPlan(2, 32, 6)),
    (502, 528, RingPlan(2, 32, 4)),
    (529, 1056, RingPlan(1, 32, 3)),
    (1057, 1188, RingPlan(2, 32, 6)),
)
"""Fewest and most groups, rows times kv heads, for which a ring is faster, as raced on an H200. Of up to 1,056 all
programs find a place on its 132 multiprocessors at once. With other numbers of these results are right too, and times
further from the best."""


@dataclass(frozen=True)
class AttendPlan:
    """How the selected blocks of a row and kv head are shared out, by shapes alone."""

    splits: int  # programs that share one row and kv head
    tile: int  # tokens of a tile: BLOCK or a part of it
    num_warps: int
    num_stages: int
    late: bool = True  # what follows may start where the keys end, not before
    late_merge: bool = True  # and what follows the merge at the merge's end
    ring: RingPlan | None = None  # by ``attend_ring``, for which nothing above counts; splits must be 1


def sparse_attention_decode(
    q: Tensor, kv: PagedKv, blocks: Tensor, queries: RaggedQueries, scale: float
) -> tuple[Tensor, Tensor]:
    """``sparse_attention_ref`` for sequences that all have equally many query rows; allocates what it needs."""
    batch = uniform_batch(queries, q.shape[0])
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    workspace = MergeWorkspace(q, blocks.shape[2])
    sparse_attention_decode_into(out, lse, q, kv, blocks, batch, scale, workspace)
    return out, lse


def sparse_attention_decode_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    kv: PagedKv,
    blocks: Tensor,
    batch: DecodeBatch,
    scale: float,
    workspace: MergeWorkspace,
    plan: AttendPlan | None = None,
) -> None:
    """Write the output to out, [num_rows, num_heads, head_dim] in q's dtype, and to lse, float32 [num_rows, num_heads].

    blocks: int32 [num_rows, num_kv_heads, topk], logical ids in any order, no id twice; -1 and blocks that the row
    cannot see are passed over. Rows without any block, padded ones among them, give 0 and -inf. Neither allocates nor
    waits, and launches by shapes alone; a plan measured for M3 is used where none is given.
    """
    num_rows, num_heads, dim = q.shape
    kv_heads, topk = blocks.shape[1:]
    share = num_heads // kv_heads
    assert num_rows == batch.num_seqs * batch.query_len, (q.shape, batch.num_seqs, batch.query_len)
    assert kv.k.shape[1:] == (kv_heads, BLOCK, dim), (kv.k.shape, q.shape, blocks.shape)
    assert q.stride(2) == out.stride(2) == 1
    assert batch.page_table.stride(1) == 1, batch.page_table.stride()
    if num_rows == 0:
        return
    plan = plan or attend_plan(q, kv, batch, topk)
    if plan.ring:
        attend_by_ring((out, lse), q, kv, blocks, batch, scale, plan.ring)
        return
    early = chained()
    parts = workspace.parts(plan.splits)
    places = -(-topk // plan.splits)
    share_tile = max(triton.next_power_of_2(share), 16)
    _attend_kernel[(num_rows, kv_heads, plan.splits)](
        q,
        blocks,
        batch.page_table,
        batch.seq_lens,
        scale * 1.4426950408889634,
        batch.query_len,
        q.stride(0),
        q.stride(1),
        *blocks.stride(),
        batch.page_table.stride(0),
        **page_arguments(kv, lse),
        **result_arguments(out, lse, parts),
        SHARE=share,
        SHARE_TILE=share_tile,
        DIM=dim,
        TOPK=topk,
        PLACES=places,
        PLACE_TILE=triton.next_power_of_2(places),
        TOKENS=BLOCK,
        TILE=plan.tile,
        EARLY=early,
        LATE=plan.late,
        SORTED=batch.query_len > 1 and plan.splits == 1,
        **launch_options(early, plan.num_warps, tile_stages(plan.num_stages, share_tile, plan.tile, q, kv)),
    )
    if plan.splits > 1:
        merge_parts(out, lse, parts, plan.late_merge)


def attend_plan(q: Tensor, kv: PagedKv, batch: DecodeBatch, topk: int) -> AttendPlan:
    """By shapes alone; measured on an H200, shape by shape."""
    groups = q.shape[0] * kv.k.shape[1]  # rows times kv heads
    ring = _ring_plan(groups)
    if ring and ring_fits(q, kv, batch, topk):
        return AttendPlan(1, ring.tile, ring.warps, 1, ring=ring)
    return _split_plan(groups, topk, kv.k)


def _split_plan(groups: int, topk: int, k: Tensor) -> AttendPlan:
    """Without a ring: splits, tile, warps and stages."""
    target = max(1, min(topk, (256 if groups >= 64 else 128) // groups))
    splits = 1 << (target.bit_length() - 1)
    late = groups < 32 or splits == 1
    if fp8_pairs(k)[0] and groups >= 64:
        return AttendPlan(splits, 64, 2, 3, late, late_merge=False)
    if k.element_size() == 1:
        return AttendPlan(splits, BLOCK, 8 if groups <= 8 else 4, 2, late, late_merge=False)
    late_merge = 4 < groups < 32
    if k.dtype == torch.float32:  # twice the shared memory
        return AttendPlan(splits, 64, 4, 2, late, late_merge)
    if groups == 64 or 396 < groups < 1024:
        return AttendPlan(splits, 32, 4, 4, late, late_merge)
    if groups >= 1024:
        return AttendPlan(1, BLOCK, 4, 2)
    # Up to 396 programs all run at once.
    return AttendPlan(splits, 64, 4, 3, late or groups > 64, late_merge)


def _ring_plan(groups: int) -> RingPlan | None:
    """For so many groups; None where the other kernel is as fast, or nobody has raced them."""
    return next((ring for fewest, most, ring in _RINGS if fewest <= groups <= most), None)


@triton.jit(do_not_specialize=["query_len"])
def _attend_kernel(
    q_ptr,  # [num_rows, num_heads, DIM]
    blocks_ptr,  # int32 [num_rows, kv_heads, TOPK]
    page_table_ptr,  # int32 [num_seqs, max_blocks]
    seq_lens_ptr,  # int32 [num_seqs]
    scale,  # of the logits, times log2(e)
    query_len,
    q_row_stride,
    q_head_stride,
    blocks_row_stride,
    blocks_head_stride,
    blocks_place_stride,
    table_stride,
    k_ptr,  # [num_pages, kv_heads, TOKENS, DIM]
    v_ptr,  # [num_pages, kv_heads, TOKENS, DIM], or pairs of bytes, int16 [..., DIM / 2]
    k_scale_ptr,  # float32 [num_pages, kv_heads, TOKENS]
    v_scale_ptr,  # float32 [num_pages, kv_heads, TOKENS]
    k_page_stride,
    k_head_stride,
    k_token_stride,
    v_page_stride,
    v_head_stride,
    v_token_stride,
    k_scale_page_stride,
    k_scale_head_stride,
    v_scale_page_stride,
    v_scale_head_stride,
    CODE: tl.constexpr,
    PAIRS: tl.constexpr,  # V is read as pairs of bytes, in this format
    SCALED: tl.constexpr,
    out_ptr,  # LAST: [num_rows, num_heads, DIM]; otherwise parts, [splits, num_rows, num_heads, DIM]
    lse_ptr,  # LAST: float32 [num_rows, num_heads]; otherwise parts, base 2, [splits, num_rows, num_heads]
    out_row_stride,
    out_head_stride,
    out_split_stride,
    lse_row_stride,
    lse_head_stride,
    lse_split_stride,
    LAST: tl.constexpr,
    SHARE: tl.constexpr,
    SHARE_TILE: tl.constexpr,
    DIM: tl.constexpr,
    TOPK: tl.constexpr,
    PLACES: tl.constexpr,  # of TOPK, for one program
    PLACE_TILE: tl.constexpr,  # PLACES rounded up to a power of two
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
    SORTED: tl.constexpr,
):
    row = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    seq = row // query_len
    heads = tl.arange(0, SHARE_TILE)
    dims = tl.arange(0, DIM)
    token = tl.arange(0, TILE)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()
    visible = tl.load(seq_lens_ptr + seq) - query_len + row % query_len + 1
    num_blocks = (visible + TOKENS - 1) // TOKENS
    q_at = q_ptr + row.to(tl.int64) * q_row_stride + (kv_head * SHARE + heads[:, None]) * q_head_stride + dims[None, :]
    q = tl.load(q_at, mask=heads[:, None] < SHARE, other=0.0)  # [SHARE_TILE, DIM]
    q, unit = prepare_q(q, k_ptr.dtype.element_ty, CODE)
    unit = unit * scale
    # Which pages, before the loop: inside it, each load would wait for two others in turn.
    place = tl.arange(0, PLACE_TILE)
    chosen_at = blocks_ptr + row.to(tl.int64) * blocks_row_stride + kv_head * blocks_head_stride
    mine = (place < PLACES) & (split * PLACES + place < TOPK)
    blocks = tl.load(chosen_at + (split * PLACES + place) * blocks_place_stride, mask=mine, other=-1)
    live = (blocks >= 0) & (blocks < num_blocks)
    pages = tl.load(page_table_ptr + seq.to(tl.int64) * table_stride + blocks, mask=live, other=0)
    lefts = tl.where(live, visible - blocks * TOKENS, 0)  # [PLACE_TILE], visible tokens from the block's start on
    turn = place
    if SORTED:
        # By number, so that a sequence's rows come to a block that several of them chose at about the same time: one of
        # them has it from memory then, the others from the cache.
        number = tl.where(live, blocks, 0x7FFFFFFF)
        tie = (number[None, :] == number[:, None]) & (place[None, :] < place[:, None])
        turn = tl.sum(((number[None, :] < number[:, None]) | tie).to(tl.int32), axis=1)
    V_DIM: tl.constexpr = DIM // 2 if PAIRS else DIM
    ZERO: tl.constexpr = 0 if PAIRS else 0.0
    k_at = k_ptr + kv_head.to(tl.int64) * k_head_stride + token[:, None] * k_token_stride + dims[None, :]
    v_at = v_ptr + kv_head.to(tl.int64) * v_head_stride + token[:, None] * v_token_stride + tl.arange(0, V_DIM)[None, :]
    k_scale_at = k_scale_ptr + kv_head.to(tl.int64) * k_scale_head_stride + token
    v_scale_at = v_scale_ptr + kv_head.to(tl.int64) * v_scale_head_stride + token
    # A finite floor instead of -inf: the difference of two of them is 0, not NaN.
    top = tl.full((SHARE_TILE,), -1.0e38, tl.float32)
    total = tl.zeros((SHARE_TILE, TILE), tl.float32)
    sums = tl.zeros((SHARE_TILE, V_DIM), tl.float32)
    odds = sums
    PIECES: tl.constexpr = TOKENS // TILE
    for step in tl.range(0, PLACES * PIECES):
        this = turn == step // PIECES
        start = step % PIECES * TILE
        page = tl.sum(tl.where(this, pages, 0), axis=0).to(tl.int64)
        left = tl.sum(tl.where(this, lefts, 0), axis=0) - start
        mask = token < left
        k = tl.load(k_at + page * k_page_stride + start * k_token_stride, mask=mask[:, None], other=0.0)
        v = tl.load(v_at + page * v_page_stride + start * v_token_stride, mask=mask[:, None], other=ZERO)
        k_scale = tl.full((TILE,), 1.0, tl.float32)
        v_scale = k_scale
        if SCALED:
            k_scale = tl.load(k_scale_at + page * k_scale_page_stride + start, mask=mask, other=1.0)
            v_scale = tl.load(v_scale_at + page * v_scale_page_stride + start, mask=mask, other=1.0)
        top, total, sums, odds = attend_tile(
            q, unit, k, v, k_scale, v_scale, mask[None, :], top, total, sums, odds, CODE, PAIRS, SCALED
        )
    if EARLY and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    result, log_sum = finish(top, total, sums, odds, PAIRS)
    head = kv_head * SHARE + heads
    real = heads < SHARE
    out_at = out_ptr + split.to(tl.int64) * out_split_stride + row.to(tl.int64) * out_row_stride
    out_at += head[:, None] * out_head_stride + dims[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=real[:, None])
    lse_at = lse_ptr + split.to(tl.int64) * lse_split_stride + row.to(tl.int64) * lse_row_stride
    tl.store(lse_at + head * lse_head_stride, log_sum * 0.6931471805599453 if LAST else log_sum, mask=real)
