"""Causal attention of many query rows to all keys of their sequence: a tile of rows passes over its pages."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.fp8_bits import CONVERT, PLAIN, fp8_code
from pdkv_kernels.hardware import hardware
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.prefill_tile import attend_keys, split_rows
from pdkv_kernels.ragged_tiles import most_tiles, tile_sequence
from pdkv_kernels.sparse_attention_prefill import PrefillTuning, measured_tuning, padded_share

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOG2_E = 1.4426950408889634
_WIDE = PrefillTuning(tile_keys=128, tile_registers=None)
_WIDE_FP8 = PrefillTuning(tile_rows=64, tile_warps=4, tile_keys=128, tile_registers=None)
"""Best on an H200 where every page is shared by all rows; float32 tiles would not fit."""
_WIDE_BYTES = 162 << 10
"""Shared memory that ``_WIDE`` takes; fp8 tiles are a quarter of it."""


def paged_attention_prefill(
    q: Tensor,
    kv: PagedKv,
    queries: RaggedQueries,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
    tuning: PrefillTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """``paged_attention_ref`` for many rows a sequence; what ``sparse_attention_prefill`` says of fp8 holds here too.

    Rows behind the last sequence's are not written.
    """
    tuning = tuning or _tuning(q, kv)
    num_rows, num_heads, dim = q.shape
    kv_heads = kv.k.shape[1]
    share = num_heads // kv_heads
    assert q.stride(2) == kv.k.stride(3) == kv.v.stride(3) == 1
    if out is None:
        out = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if num_rows == 0:
        return out
    rows = max(1, tuning.tile_rows // padded_share(share), 16 // padded_share(share))
    code, k = fp8_code(kv.k)
    _, v = fp8_code(kv.v)
    k_scale = kv.k_scale if kv.k_scale is not None else out[1]  # never read where there are none
    v_scale = kv.v_scale if kv.v_scale is not None else out[1]
    scale_strides = k_scale.stride() if kv.k_scale is not None else (0, 0, 0)
    value = q.dtype if code == PLAIN or q.dtype == torch.float32 else torch.float16
    bound = {"maxnreg": tuning.tile_registers} if hardware().nvidia and tuning.tile_registers else {}
    num_seqs = queries.context_lens.numel()
    _attend_dense[(most_tiles(num_rows, num_seqs, rows), kv_heads)](
        q, k, v, k_scale, v_scale, *k.stride()[:3], *v.stride()[:3], *scale_strides, *out,
        queries.query_starts, queries.context_lens, queries.page_table, queries.page_table.stride(0),
        q.stride(0), q.stride(1), out[0].stride(0), out[0].stride(1), out[1].stride(0), out[1].stride(1),
        num_rows, num_seqs, scale * _LOG2_E,
        SPLIT_Q=tuning.split_q and code == CONVERT and kv.k.dtype == torch.float8_e4m3fn, CODE=code,
        SCALED=kv.k_scale is not None, VTYPE=_TRITON_TYPES[value], SHARE=share, SHARE_P=padded_share(share), DIM=dim,
        BLOCK=BLOCK, KEYS=tuning.tile_keys, TILE_ROWS=rows, STAGES=tuning.tile_stages,
        num_warps=tuning.tile_warps, num_stages=tuning.tile_stages, **bound,
    )  # fmt: skip
    return out


def _tuning(q: Tensor, kv: PagedKv) -> PrefillTuning:
    if q.dtype == torch.float32:
        return measured_tuning(kv)
    if kv.k.dtype.itemsize == 1:
        return _WIDE_FP8
    return _WIDE if hardware().shared_bytes >= _WIDE_BYTES else measured_tuning(kv)


@triton.jit(do_not_specialize=["num_rows", "num_seqs"])
def _attend_dense(
    q, k, v, k_scale, v_scale,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token, out, out_lse,
    query_starts, context_lens, page_table, table_row, q_row, q_head, o_row, o_head, lse_row, lse_head,
    num_rows, num_seqs, scale,
    SPLIT_Q: tl.constexpr, CODE: tl.constexpr, SCALED: tl.constexpr, VTYPE: tl.constexpr, SHARE: tl.constexpr,
    SHARE_P: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, TILE_ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One tile and kv head. The last tiles have the most to do, so they come first."""
    ROWS: tl.constexpr = TILE_ROWS * SHARE_P
    PARTS: tl.constexpr = BLOCK // KEYS
    head = tl.program_id(1)
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    seq, before = tile_sequence(tile, query_starts, num_seqs, 0, num_rows, TILE_ROWS)
    if seq >= 0:
        start = tl.load(query_starts + seq)
        first_row = start + (tile - before) * TILE_ROWS
        end_row = tl.load(query_starts + seq + 1)
        position = first_row - start + tl.load(context_lens + seq)  # of the tile's first row
        num_keys = position + tl.minimum(TILE_ROWS, end_row - first_row)
        m = tl.arange(0, ROWS)
        n = tl.arange(0, KEYS)
        d = tl.arange(0, DIM)
        in_tile, in_head = m // SHARE_P, m % SHARE_P
        row = (first_row + in_tile).to(tl.int64)
        asks = (row < end_row) & (in_head < SHARE)
        q_at = q + row * q_row + (head * SHARE + in_head).to(tl.int64) * q_head
        q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks[:, None], other=0.0)
        q_high, q_low, row_scale = split_rows(q_tile, scale, SPLIT_Q)
        top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that differences are never NaN
        total = tl.zeros([ROWS], tl.float32)
        unit = 1e-37
        acc = tl.zeros([ROWS, DIM], tl.float32)
        k_of_head = k + head.to(tl.int64) * k_head + n[:, None] * k_token + d[None, :]
        v_of_head = v + head.to(tl.int64) * v_head + n[:, None] * v_token + d[None, :]
        table = page_table + seq.to(tl.int64) * table_row
        whole = (position + 1) // BLOCK  # blocks that every row sees to the end
        num_blocks = (num_keys - 1) // BLOCK + 1
        for masked in tl.static_range(2):
            begin_at, end_at = (0, whole) if masked == 0 else (whole, num_blocks)
            page = tl.load(table + begin_at, mask=begin_at < end_at, other=0).to(tl.int64)
            for step in tl.range(begin_at * PARTS, end_at * PARTS, num_stages=STAGES):
                begin = step % PARTS * KEYS
                s_at = page * s_page + head * s_head + begin * s_token
                left = num_keys - step * KEYS
                seen = position + in_tile + 1 - step * KEYS
                acc, top, total, unit = attend_keys(
                    acc, top, total, unit, q_tile, q_high, q_low, row_scale,
                    k_of_head + (page * k_page + begin * k_token), v_of_head + (page * v_page + begin * v_token),
                    seen, left, k_scale, v_scale, s_at, s_token,
                    MASKED=masked == 1, SPLIT_Q=SPLIT_Q, CODE=CODE, SCALED=SCALED, VTYPE=VTYPE, KEYS=KEYS,
                )  # fmt: skip
                page = tl.load(table + tl.minimum((step + 1) // PARTS, end_at - 1)).to(tl.int64)
        if SCALED:
            acc = acc * unit
        acc = acc / total[:, None]
        o_at = out + row * o_row + (head * SHARE + in_head).to(tl.int64) * o_head
        tl.store(o_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=asks[:, None])
        lse_at = out_lse + row * lse_row + (head * SHARE + in_head).to(tl.int64) * lse_head
        tl.store(lse_at, (top + tl.log2(total)) * 0.6931471805599453, mask=asks)
