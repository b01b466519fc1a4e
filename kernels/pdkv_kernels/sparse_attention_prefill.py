"""Causal attention of many query rows to selected blocks: pages are loaded for all rows that chose them.

Two passes. Loose readers of a page (``page_readers``) attend to it page by page; what each gets from one page alone
goes to a workspace with its softmax sum. Then tiles of neighbouring rows attend to the pages they share under a running
softmax, take in the partial results, and write each output once.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.fp8_bits import CONVERT, PLAIN, fp8_code, half_of_bits
from pdkv_kernels.hardware import hardware
from pdkv_kernels.page_readers import PageReaders, TileShape, page_readers
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.prefill_tile import attend_keys, load_scales, split_rows

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_LOG2_E = 1.4426950408889634
_WORKSPACE_SLOTS = 1 << 18
"""Partial results that exist at one time, 4 KiB each for M3 in bfloat16."""


@dataclass(frozen=True)
class PrefillTuning:
    """What was measured best; the result does not depend on it beyond rounding."""

    page_rows: int = 64
    """Rows times q heads of a tile that attends page by page."""
    page_warps: int = 4
    page_stages: int = 1
    page_programs: int = 264
    page_ahead: bool = False
    """Rows of q are loaded a turn ahead, and partial results are left as sums, not divided."""
    readers_per_item: int = 128
    tile_rows: int = 128
    """Rows times q heads of a tile that attends to its shared pages."""
    tile_keys: int = 64
    """Keys of a page that such a tile takes at a time."""
    tile_warps: int = 8
    tile_stages: int = 2
    tile_registers: int | None = 128
    """Bound for each thread, so that two programs share a multiprocessor; NVIDIA only."""
    share_from: int = 4
    split_q: bool = True
    """e4m3 keys: multiply them natively by q in two fp8 parts, instead of widening them."""


_PLAIN = PrefillTuning(page_ahead=True)
_UNSCALED_FP8 = PrefillTuning(tile_rows=64, tile_warps=4, tile_registers=168)
_SCALED_FP8 = PrefillTuning(tile_keys=128, tile_registers=None)


def measured_tuning(kv: PagedKv) -> PrefillTuning:
    """Best on an H200 for pages of this kind."""
    if kv.k.dtype.itemsize > 1:
        return _PLAIN if kv.k.dtype == torch.bfloat16 else PrefillTuning()
    return _UNSCALED_FP8 if kv.k_scale is None else _SCALED_FP8


def sparse_attention_prefill(
    q: Tensor,
    kv: PagedKv,
    blocks: Tensor,
    queries: RaggedQueries,
    scale: float,
    out: tuple[Tensor, Tensor] | None = None,
    tuning: PrefillTuning | None = None,
) -> tuple[Tensor, Tensor]:
    """``sparse_attention_ref`` for many rows a sequence. Rows behind the last sequence's give 0 and -inf.

    fp8 K and V are widened exactly; with ``split_q`` the sum of two fp8 numbers stands for each element of q, within
    2^-8 of it as bfloat16 is. V's scales ride on the softmax weights, relative to the page's largest, in float16.
    """
    tuning = tuning or measured_tuning(kv)
    num_rows, num_heads, dim = q.shape
    kv_heads, topk = blocks.shape[1:]
    share = num_heads // kv_heads
    share_padded = padded_share(share)
    assert q.stride(2) == 1
    assert kv.k.stride(3) == 1
    assert kv.v.stride(3) == 1
    if out is None:
        out = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    if num_rows == 0:
        return out
    rows = max(1, min(8, tuning.tile_rows // share_padded), 16 // share_padded)
    window_rows = max(rows, _WORKSPACE_SLOTS // (kv_heads * topk) // rows * rows)
    window_rows = min(window_rows, triton.cdiv(num_rows, rows) * rows)
    shape = TileShape(rows, min(tuning.share_from, rows), tuning.readers_per_item, window_rows)
    readers = page_readers(blocks, queries, kv.k.shape[0], shape)
    slots = window_rows * kv_heads * topk
    part = torch.empty(slots, share, dim, dtype=q.dtype, device=q.device)
    part_top = torch.empty(slots, share, dtype=torch.float32, device=q.device)
    if q.dtype == torch.float16:  # sums of many values might be beyond it, their means are not
        tuning = replace(tuning, page_ahead=False)
    part_total = torch.empty_like(part_top) if tuning.page_ahead else part_top
    pass_ = _Pass(q, kv, readers, scale, (part, part_top, part_total), topk, shape, tuning)
    for window in range(triton.cdiv(num_rows, window_rows)):
        if shape.share_from > 1:
            pass_.attend_pages(window)
        pass_.attend_tiles(window, out)
    return out


def padded_share(share: int) -> int:
    """q heads of a kv head as a tile holds them: at least 2, so that 8 rows give the 16 that a product needs."""
    return max(2, int(triton.next_power_of_2(share)))


class _Pass:
    """Launches of one call. Owns nothing: all tensors are the caller's or the call's."""

    def __init__(
        self, q: Tensor, kv: PagedKv, readers: PageReaders, scale: float, parts: tuple[Tensor, Tensor, Tensor],
        topk: int, shape: TileShape, tuning: PrefillTuning,
    ) -> None:  # fmt: skip  # noqa: PLR0913
        self._q, self._kv, self._readers, self._parts = q, kv, readers, parts
        self._topk, self._shape, self._tuning = topk, shape, tuning
        self._scale = scale * _LOG2_E
        code, k = fp8_code(kv.k)
        _, v = fp8_code(kv.v)
        scaled = kv.k_scale is not None
        k_scale = kv.k_scale if kv.k_scale is not None else parts[1]  # never read where there are none
        v_scale = kv.v_scale if kv.v_scale is not None else parts[1]
        scale_strides = k_scale.stride() if scaled else (0, 0, 0)
        assert v_scale.stride() == k_scale.stride()
        self._pages = (
            k, v, k_scale, v_scale,
            k.stride(0), k.stride(1), k.stride(2), v.stride(0), v.stride(1), v.stride(2), *scale_strides,
        )  # fmt: skip
        share = q.shape[1] // kv.k.shape[1]
        value = q.dtype if code == PLAIN or q.dtype == torch.float32 else torch.float16
        self._splits = tuning.split_q and code == CONVERT and kv.k.dtype == torch.float8_e4m3fn
        self._constants = {
            "CODE": code,
            "SCALED": scaled,
            "QTYPE": _TRITON_TYPES[q.dtype],
            "VTYPE": _TRITON_TYPES[value],
            "HEADS": kv.k.shape[1],
            "TOPK": topk,
            "SHARE": share,
            "SHARE_P": padded_share(share),
            "DIM": q.shape[2],
            "BLOCK": BLOCK,
            "AHEAD": tuning.page_ahead,
        }

    def attend_pages(self, window: int) -> None:
        """What loose readers of a window get from each page, into the workspace."""
        r, tuning = self._readers, self._tuning
        most_items = r.item_key.shape[1]
        programs = min(tuning.page_programs, most_items)
        tile = max(16, self._constants["SHARE_P"], tuning.page_rows)
        _attend_pages[(programs,)](
            self._q, *self._pages, *self._parts,
            r.item_count, r.item_key, r.item_first, r.key_count, r.key_limit, r.key_hidden, r.key_start,
            r.reader_slot, r.reader_limit,
            self._q.stride(0), self._q.stride(1), self._kv.k.shape[0], window, most_items,
            self._shape.window_rows, self._scale,
            READERS_PER_ITEM=self._shape.readers_per_item, ROWS=tile, STAGES=tuning.page_stages,
            num_warps=tuning.page_warps, num_stages=tuning.page_stages, **self._constants,
        )  # fmt: skip

    def attend_tiles(self, window: int, out: tuple[Tensor, Tensor]) -> None:
        """Shared pages of each tile of a window, and the merge."""
        r, tuning = self._readers, self._tuning
        num_rows = self._q.shape[0]
        tiles = self._shape.window_rows // self._shape.rows
        first_tile = window * tiles
        tiles = min(tiles, triton.cdiv(num_rows, self._shape.rows) - first_tile)
        bound = {"maxnreg": tuning.tile_registers} if hardware().nvidia and tuning.tile_registers else {}
        _attend_tiles[(tiles, self._kv.k.shape[1])](
            self._q, *self._pages, *self._parts, *out,
            r.shared_count, r.whole_count, r.shared_page, r.shared_limit, r.shared_reach, r.loose_count,
            self._q.stride(0), self._q.stride(1), out[0].stride(0), out[0].stride(1), out[1].stride(0),
            out[1].stride(1), num_rows, first_tile, r.shared_page.shape[2], self._shape.window_rows, self._scale,
            SPLIT_Q=self._splits, TILE_ROWS=self._shape.rows, KEYS=tuning.tile_keys, STAGES=tuning.tile_stages,
            num_warps=tuning.tile_warps, num_stages=tuning.tile_stages, **bound, **self._constants,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pages", "window", "most_items", "window_rows"])
def _attend_pages(
    q, k, v, k_scale, v_scale,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token,
    part, part_top, part_total, item_count, item_key, item_first, key_count, key_limit, key_hidden, key_start,
    reader_slot, reader_limit,
    q_row, q_head, num_pages, window, most_items, window_rows, scale,
    READERS_PER_ITEM: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
    CODE: tl.constexpr, SCALED: tl.constexpr, QTYPE: tl.constexpr, VTYPE: tl.constexpr,
    HEADS: tl.constexpr, TOPK: tl.constexpr, SHARE: tl.constexpr, SHARE_P: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Item after item: one page stays, its readers pass by, each with all q heads of the page's kv head.

    What a reader gets: with AHEAD, sums that count from the logit in ``part_top``; else their quotients and the log of
    the softmax sum.
    """
    READERS: tl.constexpr = ROWS // SHARE_P
    m = tl.arange(0, ROWS)
    n = tl.arange(0, BLOCK)
    d = tl.arange(0, DIM)
    in_head = m % SHARE_P
    first_slot = window * window_rows * (HEADS * TOPK)
    num_items = tl.load(item_count + window)
    for item in range(tl.program_id(0), num_items, tl.num_programs(0)):
        key = tl.load(item_key + window * most_items + item)
        first = tl.load(item_first + window * most_items + item)
        count = tl.minimum(tl.load(key_count + key) - first, READERS_PER_ITEM)
        base = tl.load(key_start + key) + first
        head = (key // num_pages) % HEADS
        page = (key % num_pages).to(tl.int64)
        there = n < tl.load(key_limit + key)
        k_at = k + page * k_page + head.to(tl.int64) * k_head
        v_at = v + page * v_page + head.to(tl.int64) * v_head
        k_tile = tl.load(k_at + n[:, None] * k_token + d[None, :], mask=there[:, None], other=0.0)
        v_tile = tl.load(v_at + n[:, None] * v_token + d[None, :], mask=there[:, None], other=0.0)
        k_tile = half_of_bits(k_tile, CODE).to(QTYPE)
        v_tile = half_of_bits(v_tile, CODE).to(VTYPE)
        column = tl.full([BLOCK], scale, tl.float32)
        weight = tl.full([BLOCK], 1.0, tl.float32)
        top_weight = 1.0
        if SCALED:
            s_at = page * s_page + head * s_head
            column, weight = load_scales(k_scale, v_scale, s_at, s_token, tl.load(key_limit + key), BLOCK)
            if not AHEAD:
                column = column * scale
            top_weight = tl.maximum(tl.max(tl.abs(weight), axis=0), 1e-37)
            weight = weight / top_weight
        reader = m // SHARE_P
        asks = (reader < count) & (in_head < SHARE)
        slot = tl.load(reader_slot + base + reader, mask=asks, other=0)
        if AHEAD:
            in_q = (head * SHARE + in_head).to(tl.int64) * q_head
            q_at = q + (slot // (HEADS * TOPK)).to(tl.int64) * q_row + in_q
            q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks[:, None], other=0.0)
            partly = tl.load(key_hidden + key) > 0
            asks_next = (READERS + reader < count) & (in_head < SHARE)
            slot_next = tl.load(reader_slot + base + READERS + reader, mask=asks_next, other=0)
            for begin in range(0, count, READERS):
                logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
                # The next readers' rows travel while these attend.
                q_at = q + (slot_next // (HEADS * TOPK)).to(tl.int64) * q_row + in_q
                q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks_next[:, None], other=0.0)
                if SCALED:
                    logits = logits * column[None, :]
                if partly:
                    limit = tl.load(reader_limit + base + begin + reader, mask=asks, other=0)
                    logits = tl.where(n[None, :] < limit[:, None], logits, -float("inf"))
                top = tl.maximum(tl.max(logits, axis=1), -1e30) * scale  # finite, so that differences are never NaN
                p = tl.exp2(logits * scale - top[:, None])
                total = tl.sum(p, axis=1)
                if SCALED:
                    p = p * weight[None, :]
                acc = tl.dot(p.to(VTYPE), v_tile, input_precision="ieee")
                place = (slot - first_slot).to(tl.int64) * SHARE + in_head
                now = asks
                asks, slot = asks_next, slot_next
                asks_next = (begin + 2 * READERS + reader < count) & (in_head < SHARE)
                slot_next = tl.load(reader_slot + base + begin + 2 * READERS + reader, mask=asks_next, other=0)
                tl.store(part + place[:, None] * DIM + d[None, :], acc.to(QTYPE), mask=now[:, None])
                tl.store(part_top + place, top + tl.log2(top_weight), mask=now)
                tl.store(part_total + place, total / top_weight, mask=now)
        else:
            for begin in range(0, count, READERS):
                limit = tl.load(reader_limit + base + begin + reader, mask=asks, other=0)
                row = (slot // (HEADS * TOPK)).to(tl.int64)
                q_at = q + row * q_row + (head * SHARE + in_head).to(tl.int64) * q_head
                q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks[:, None], other=0.0)
                logits = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * column[None, :]
                logits = tl.where(n[None, :] < limit[:, None], logits, -float("inf"))
                top = tl.max(logits, axis=1)
                p = tl.exp2(logits - tl.where(top == -float("inf"), 0.0, top)[:, None])
                total = tl.sum(p, axis=1)
                if SCALED:
                    p = p * weight[None, :]
                acc = tl.dot(p.to(VTYPE), v_tile, input_precision="ieee")
                acc = acc * (top_weight / tl.where(total > 0.0, total, 1.0))[:, None]
                place = (slot - first_slot).to(tl.int64) * SHARE + in_head
                now = asks
                asks = (begin + READERS + reader < count) & (in_head < SHARE)
                slot = tl.load(reader_slot + base + begin + READERS + reader, mask=asks, other=0)
                tl.store(part + place[:, None] * DIM + d[None, :], acc.to(QTYPE), mask=now[:, None])
                tl.store(part_top + place, top + tl.log2(tl.where(total > 0.0, total, 1.0)), mask=now)


@triton.jit(do_not_specialize=["num_rows", "first_tile", "window_rows"])
def _attend_tiles(
    q, k, v, k_scale, v_scale,
    k_page, k_head, k_token, v_page, v_head, v_token, s_page, s_head, s_token,
    part, part_top, part_total, out, out_lse,
    shared_count, whole_count, shared_page, shared_limit, shared_reach, loose_count,
    q_row, q_head, o_row, o_head, lse_row, lse_head, num_rows, first_tile, capacity, window_rows, scale,
    SPLIT_Q: tl.constexpr, TILE_ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
    CODE: tl.constexpr, SCALED: tl.constexpr, QTYPE: tl.constexpr, VTYPE: tl.constexpr,
    HEADS: tl.constexpr, TOPK: tl.constexpr, SHARE: tl.constexpr, SHARE_P: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one kv head: shared pages first, then partial results of its loose choices."""
    ROWS: tl.constexpr = TILE_ROWS * SHARE_P
    PARTS: tl.constexpr = BLOCK // KEYS
    tile = first_tile + tl.program_id(0)
    head = tl.program_id(1)
    m = tl.arange(0, ROWS)
    n = tl.arange(0, KEYS)
    d = tl.arange(0, DIM)
    in_tile, in_head = m // SHARE_P, m % SHARE_P
    row = (tile * TILE_ROWS + in_tile).to(tl.int64)
    asks = (row < num_rows) & (in_head < SHARE)
    q_at = q + row * q_row + (head * SHARE + in_head).to(tl.int64) * q_head
    q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks[:, None], other=0.0)
    q_high, q_low, row_scale = split_rows(q_tile, scale, SPLIT_Q)
    top = tl.full([ROWS], -1e30, tl.float32)  # finite, so that differences are never NaN
    total = tl.zeros([ROWS], tl.float32)
    unit = 1e-37  # what the accumulator counts in: V's largest scale so far
    acc = tl.zeros([ROWS, DIM], tl.float32)
    first = (tile * HEADS + head).to(tl.int64) * capacity
    k_of_head = k + head.to(tl.int64) * k_head + n[:, None] * k_token + d[None, :]
    v_of_head = v + head.to(tl.int64) * v_head + n[:, None] * v_token + d[None, :]
    num_shared = tl.load(shared_count + tile * HEADS + head)
    num_whole = tl.load(whole_count + tile * HEADS + head)
    for masked in tl.static_range(2):  # first pages that need no mask, then the others
        begin_at, end_at = (0, num_whole) if masked == 0 else (num_whole, num_shared)
        after = first + begin_at
        page = tl.load(shared_page + after, mask=begin_at < end_at, other=0).to(tl.int64)
        reach = BLOCK
        limits = tl.zeros([], tl.int64)
        if masked == 1:
            reach = tl.load(shared_reach + after, mask=begin_at < end_at, other=0)
            limits = tl.load(shared_limit + after, mask=begin_at < end_at, other=0)
        for step in tl.range(begin_at * PARTS, end_at * PARTS, num_stages=STAGES):
            begin = step % PARTS * KEYS
            k_at = k_of_head + (page * k_page + begin * k_token)
            v_at = v_of_head + (page * v_page + begin * v_token)
            seen = ((limits >> (8 * in_tile)) & 0xFF).to(tl.int32) - begin
            s_at = page * s_page + head * s_head + begin * s_token
            acc, top, total, unit = attend_keys(
                acc, top, total, unit, q_tile, q_high, q_low, row_scale, k_at, v_at, seen, reach - begin,
                k_scale, v_scale, s_at, s_token,
                MASKED=masked == 1, SPLIT_Q=SPLIT_Q, CODE=CODE, SCALED=SCALED, VTYPE=VTYPE, KEYS=KEYS,
            )  # fmt: skip
            # What the next page's loads wait for is fetched an iteration ahead of them.
            after = first + tl.minimum((step + 1) // PARTS, end_at - 1)
            page = tl.load(shared_page + after).to(tl.int64)
            if masked == 1:
                reach = tl.load(shared_reach + after)
                limits = tl.load(shared_limit + after)
    if SCALED:
        acc = acc * unit

    loose = tl.load(loose_count + row * HEADS + head, mask=asks, other=0)
    first_row = (first_tile * TILE_ROWS) // window_rows * window_rows
    slot = ((row - first_row) * HEADS + head) * TOPK
    for nth in tl.range(0, tl.max(loose, axis=0), num_stages=STAGES):
        mine = nth < loose
        place = (slot + nth) * SHARE + in_head
        part_at = tl.load(part_top + place, mask=mine, other=-1e30)
        got = tl.load(part + place[:, None] * DIM + d[None, :], mask=mine[:, None], other=0.0).to(tl.float32)
        new_top = tl.maximum(top, part_at)
        fade, share = tl.exp2(top - new_top), tl.where(mine, tl.exp2(part_at - new_top), 0.0)
        if AHEAD:
            total = total * fade + tl.load(part_total + place, mask=mine, other=0.0) * share
        else:
            total = total * fade + share
        acc = acc * fade[:, None] + got * share[:, None]
        top = new_top
    acc = acc / tl.where(total > 0.0, total, 1.0)[:, None]
    o_at = out + row * o_row + (head * SHARE + in_head).to(tl.int64) * o_head
    tl.store(o_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=asks[:, None])
    lse_at = out_lse + row * lse_row + (head * SHARE + in_head).to(tl.int64) * lse_head
    lse = tl.where(total > 0.0, (top + tl.log2(tl.where(total > 0.0, total, 1.0))) * 0.6931471805599453, -float("inf"))
    tl.store(lse_at, lse, mask=asks)
