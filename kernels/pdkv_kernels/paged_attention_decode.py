"""Attention of decode rows to all keys of their sequence, the keys shared out among programs.

A program takes every so many blocks of one sequence for one kv head. The query heads of that kv head, for all query
rows of the sequence, are the rows of its tiles (``decode_tile``), so K and V are read once however many rows there
are. A second launch puts the programs' results together.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.decode_arguments import page_arguments, result_arguments, tile_stages
from pdkv_kernels.decode_batch import DecodeBatch, uniform_batch
from pdkv_kernels.decode_tile import attend_tile, finish, prepare_q
from pdkv_kernels.fp8_bits import fp8_pairs
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.softmax_merge import MergeWorkspace, merge_parts

MOST_SPLITS = 256
"""Programs that share one sequence and kv head, at most; a workspace must hold as many parts as the plan says."""
_PAGES = 16
"""Pages that a program looks up at once."""


@dataclass(frozen=True)
class DensePlan:
    """How a sequence's keys are shared out, by shapes alone."""

    splits: int  # programs that share one sequence and kv head
    tile: int  # tokens of a tile: BLOCK or a part of it
    num_warps: int
    num_stages: int
    query_rows: int = 0  # of a sequence, that one program takes; 0: all of them
    late: bool = True  # what follows may start where the keys end, not before


def paged_attention_decode(q: Tensor, kv: PagedKv, queries: RaggedQueries, scale: float) -> tuple[Tensor, Tensor]:
    """``paged_attention_ref`` for sequences that all have equally many query rows; allocates what it needs."""
    batch = uniform_batch(queries, q.shape[0])
    out = torch.empty_like(q)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    plan = dense_plan(batch, q, kv)
    workspace = MergeWorkspace(q, plan.splits)
    paged_attention_decode_into(out, lse, q, kv, batch, scale, workspace, plan)
    return out, lse


def paged_attention_decode_into(
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    kv: PagedKv,
    batch: DecodeBatch,
    scale: float,
    workspace: MergeWorkspace,
    plan: DensePlan | None = None,
) -> None:
    """Write the output to out, [num_rows, num_heads, head_dim] in q's dtype, and to lse, float32 [num_rows, num_heads].

    Rows of padded sequences give 0 and -inf. Neither allocates nor waits, and launches by shapes alone; ``dense_plan``
    is used where no plan is given, and the workspace must hold its splits.
    """
    num_rows, num_heads, dim = q.shape
    kv_heads = kv.k.shape[1]
    share = num_heads // kv_heads
    assert num_rows == batch.num_seqs * batch.query_len, (q.shape, batch.num_seqs, batch.query_len)
    assert kv.k.shape[1:] == (kv_heads, BLOCK, dim), (kv.k.shape, q.shape)
    assert q.stride(2) == out.stride(2) == 1
    assert batch.page_table.stride(1) == 1, batch.page_table.stride()
    if num_rows == 0:
        return
    plan = plan or dense_plan(batch, q, kv)
    early = chained()
    query_rows = plan.query_rows or batch.query_len
    query_tile = triton.next_power_of_2(query_rows)
    query_groups = -(-batch.query_len // query_rows)
    share_tile = max(triton.next_power_of_2(share), -(-16 // query_tile))
    stages = tile_stages(plan.num_stages, query_tile * share_tile, plan.tile, q, kv)
    parts = workspace.parts(plan.splits)
    _attend_kernel[(batch.num_seqs, kv_heads * query_groups, plan.splits)](
        q,
        batch.page_table,
        batch.seq_lens,
        scale * 1.4426950408889634,
        batch.query_len,
        query_rows,
        query_groups,
        plan.splits,
        batch.page_table.shape[1],
        q.stride(0),
        q.stride(1),
        batch.page_table.stride(0),
        **page_arguments(kv, lse),
        **result_arguments(out, lse, parts),
        SHARE=share,
        SHARE_TILE=share_tile,
        QUERY_TILE=query_tile,
        DIM=dim,
        TOKENS=BLOCK,
        TILE=plan.tile,
        PAGES=_PAGES,
        EARLY=early,
        LATE=plan.late,
        **launch_options(early, plan.num_warps, stages),
    )
    if plan.splits > 1:
        merge_parts(out, lse, parts, plan.late)


def dense_plan(batch: DecodeBatch, q: Tensor, kv: PagedKv) -> DensePlan:
    """For these shapes, measured on an H200: programs that fill two places of each of its multiprocessors, or four.

    In fp8 what costs is to widen K and V, in the order that rows of q ask for: 16 of them are best by themselves.
    """
    share = q.shape[1] // kv.k.shape[1]
    rows = batch.query_len * share
    groups = batch.num_seqs * kv.k.shape[1]
    in_pairs = fp8_pairs(kv.v)[0] != 0
    query_rows = max(1, 16 // share) if in_pairs and rows > 16 else batch.query_len
    groups *= -(-batch.query_len // query_rows)
    most = 528 if kv.k.element_size() == 1 else 264
    exact = q.dtype == torch.float32  # no tensor cores: wide tiles and many parts spill, and do not fit on small GPUs
    target = max(1, min(MOST_SPLITS // 2 if exact else MOST_SPLITS, batch.page_table.shape[1], most // groups))
    splits = 1 << (target.bit_length() - 1)
    if exact and rows > 16:
        return DensePlan(splits, 32, 8, 3)
    if in_pairs:
        return DensePlan(splits, 64, 2, 3, query_rows, late=splits == 1 or groups < 256)
    if splits == 1 and rows <= 16 and not exact:
        return DensePlan(1, BLOCK, 4, 2)
    return DensePlan(splits, 64, 4 if rows <= 64 else 8, 3)


@triton.jit(do_not_specialize=["query_len", "query_rows", "splits", "max_blocks"])
def _attend_kernel(
    q_ptr,  # [num_rows, num_heads, DIM]
    page_table_ptr,  # int32 [num_seqs, max_blocks]
    seq_lens_ptr,  # int32 [num_seqs]
    scale,  # of the logits, times log2(e)
    query_len,
    query_rows,  # of a program
    query_groups,
    splits,
    max_blocks,
    q_row_stride,
    q_head_stride,
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
    QUERY_TILE: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    PAGES: tl.constexpr,
    EARLY: tl.constexpr,
    LATE: tl.constexpr,
):
    seq = tl.program_id(0)
    kv_head = tl.program_id(1) // query_groups
    split = tl.program_id(2)
    line = tl.arange(0, QUERY_TILE * SHARE_TILE)  # [lines], a query row and head each
    query = line // SHARE_TILE
    head = line % SHARE_TILE
    real = (query < query_rows) & (head < SHARE)
    query += tl.program_id(1) % query_groups * query_rows
    real &= query < query_len
    row = (seq * query_len + query).to(tl.int64)
    head = kv_head * SHARE + head
    dims = tl.arange(0, DIM)
    token = tl.arange(0, TILE)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        if not LATE:
            tl.extra.cuda.gdc_launch_dependents()
    seq_len = tl.load(seq_lens_ptr + seq)
    num_blocks = (seq_len + TOKENS - 1) // TOKENS
    visible = tl.where(real, seq_len - query_len + query + 1, 0)  # [lines], keys that the line sees
    table_row = page_table_ptr + seq.to(tl.int64) * table_stride
    q_at = q_ptr + row[:, None] * q_row_stride + head[:, None] * q_head_stride + dims[None, :]
    q = tl.load(q_at, mask=real[:, None], other=0.0)  # [lines, DIM]
    q, unit = prepare_q(q, k_ptr.dtype.element_ty, CODE)
    unit = unit * scale
    V_DIM: tl.constexpr = DIM // 2 if PAIRS else DIM
    ZERO: tl.constexpr = 0 if PAIRS else 0.0
    k_at = k_ptr + kv_head.to(tl.int64) * k_head_stride + token[:, None] * k_token_stride + dims[None, :]
    v_at = v_ptr + kv_head.to(tl.int64) * v_head_stride + token[:, None] * v_token_stride + tl.arange(0, V_DIM)[None, :]
    k_scale_at = k_scale_ptr + kv_head.to(tl.int64) * k_scale_head_stride + token
    v_scale_at = v_scale_ptr + kv_head.to(tl.int64) * v_scale_head_stride + token
    # A finite floor instead of -inf: the difference of two of them is 0, not NaN.
    top = tl.full((QUERY_TILE * SHARE_TILE,), -1.0e38, tl.float32)
    total = tl.zeros((QUERY_TILE * SHARE_TILE, TILE), tl.float32)
    sums = tl.zeros((QUERY_TILE * SHARE_TILE, V_DIM), tl.float32)
    odds = sums
    PIECES: tl.constexpr = TOKENS // TILE
    nth = tl.arange(0, PAGES)
    for begin in tl.range(split, num_blocks, splits * PAGES, num_stages=1):
        # Which pages, before the loop: inside it, each tile would wait for its page's number.
        pages = tl.load(table_row + begin + nth * splits, mask=begin + nth * splits < max_blocks, other=0)
        count = tl.minimum(PAGES, (num_blocks - begin + splits - 1) // splits)
        for step in tl.range(0, count * PIECES):
            start = step % PIECES * TILE
            first = (begin + step // PIECES * splits) * TOKENS + start  # position of the tile's first key
            page = tl.sum(tl.where(nth == step // PIECES, pages, 0), axis=0).to(tl.int64)
            mask = first + token < seq_len
            k = tl.load(k_at + page * k_page_stride + start * k_token_stride, mask=mask[:, None], other=0.0)
            v = tl.load(v_at + page * v_page_stride + start * v_token_stride, mask=mask[:, None], other=ZERO)
            k_scale = tl.full((TILE,), 1.0, tl.float32)
            v_scale = k_scale
            if SCALED:
                k_scale = tl.load(k_scale_at + page * k_scale_page_stride + start, mask=mask, other=1.0)
                v_scale = tl.load(v_scale_at + page * v_scale_page_stride + start, mask=mask, other=1.0)
            seen = (first + token)[None, :] < visible[:, None]
            top, total, sums, odds = attend_tile(
                q, unit, k, v, k_scale, v_scale, seen, top, total, sums, odds, CODE, PAIRS, SCALED
            )
    if EARLY and LATE:
        tl.extra.cuda.gdc_launch_dependents()
    result, log_sum = finish(top, total, sums, odds, PAIRS)
    out_at = out_ptr + split.to(tl.int64) * out_split_stride + row[:, None] * out_row_stride
    out_at += head[:, None] * out_head_stride + dims[None, :]
    tl.store(out_at, result.to(out_ptr.dtype.element_ty), mask=real[:, None])
    lse_at = lse_ptr + split.to(tl.int64) * lse_split_stride + row * lse_row_stride + head * lse_head_stride
    tl.store(lse_at, log_sum * 0.6931471805599453 if LAST else log_sum, mask=real)
