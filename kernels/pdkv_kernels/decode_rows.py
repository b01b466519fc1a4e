"""The first and the last kernels of a decode step: its rows from what the host says of them, and what it has chosen.

They read or write the host's pinned memory themselves, so a step that is one graph takes no copy beside it, whoever
comes or goes. See ``decode_rows_ref`` for what they mean.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.decode_rows_ref import BEHIND, END, GROWS, PAGES, START, TOKENS, RowBuffers, RowInputs
from pdkv_kernels.draw_ref import ASKED, NUM_TOP, TEMPERATURE

_PAGES_AT_ONCE = 1024
_CHOICES_AT_ONCE = 1024
_COLUMNS = (tl.constexpr(END), tl.constexpr(START), tl.constexpr(BEHIND), tl.constexpr(GROWS), tl.constexpr(PAGES))
_END, _START, _BEHIND, _GROWS, _PAGES = _COLUMNS
_TOKENS = tl.constexpr(TOKENS)
_ASKED, _TEMPERATURE, _NUM_TOP = tl.constexpr(ASKED), tl.constexpr(TEMPERATURE), tl.constexpr(NUM_TOP)


def begin_rows(buffers: RowBuffers, batch: int, query_len: int) -> RowInputs:
    """``begin_rows_ref``; host tensors must be pinned."""
    device = buffers.numbers.device
    most, width = buffers.said.shape[1:]
    found = RowInputs(
        torch.empty(batch * query_len, dtype=torch.int64, device=device),
        torch.empty(batch * query_len, dtype=torch.int64, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
        torch.empty(batch, ASKED, dtype=torch.int64, device=device),
    )
    _begin[(batch,)](
        buffers.said_at, buffers.said, buffers.said_pages, buffers.said_asked, buffers.step,
        buffers.numbers, buffers.asked, buffers.tables, buffers.last,
        found.token_ids, found.positions, found.context_lens, found.stored_from, found.asked,
        most, width, buffers.tables.shape[1],
        QUERY_LEN=query_len, TOKENS_AT_ONCE=triton.next_power_of_2(query_len), PAGES_AT_ONCE=_PAGES_AT_ONCE,
        num_warps=4,
    )  # fmt: skip
    return found


def end_rows(buffers: RowBuffers, chosen: Tensor, batch: int, query_len: int) -> None:
    """``end_rows_ref``; the host's tensor must be pinned."""
    assert chosen.is_contiguous()
    _end[(1,)](
        buffers.told, buffers.step, buffers.last, chosen, batch * query_len, buffers.told.shape[2],
        QUERY_LEN=query_len, AT_ONCE=_CHOICES_AT_ONCE, num_warps=4,
    )  # fmt: skip


def retell_rows(buffers: RowBuffers, chosen: Tensor, tops: Tensor, asked: Tensor) -> None:
    """``retell_rows_ref``; host tensors must be pinned."""
    batch, _, most_top = tops.shape
    assert chosen.is_contiguous()
    assert tops.is_contiguous()
    _retell[(batch,)](
        buffers.told, buffers.told_tops, buffers.step, buffers.last, chosen, tops, asked, batch,
        buffers.told.shape[2], buffers.told_tops.shape[1], most_top,
        WIDTH=triton.next_power_of_2(2 * most_top), num_warps=1,
    )  # fmt: skip


@triton.jit
def _begin(
    said_at, said, said_pages, said_asked, step_number, numbers, asked, tables, last,
    token_ids, positions, context_lens, stored_from, asked_now, most, width, max_blocks,
    QUERY_LEN: tl.constexpr, TOKENS_AT_ONCE: tl.constexpr, PAGES_AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    step = tl.load(step_number)
    half = (step % 2).to(tl.int32)
    is_said = tl.load(said_at + half * most + row) == step
    line = said + (half * most + row) * width
    pages = tl.load(line + _PAGES, mask=is_said, other=0)
    is_new = is_said & (pages >= 0)
    source = half * most + tl.where(pages < 0, -1 - pages, row)
    own = numbers + source * _PAGES
    end = tl.where(is_new, tl.load(line + _END, mask=is_new, other=0), tl.load(own + _END))
    start = tl.where(is_new, tl.load(line + _START, mask=is_new, other=0), tl.load(own + _START))
    behind = tl.where(is_new, tl.load(line + _BEHIND, mask=is_new, other=0), tl.load(own + _BEHIND))
    grows = tl.where(is_new, tl.load(line + _GROWS, mask=is_new, other=0), tl.load(own + _GROWS))
    nth = tl.arange(0, TOKENS_AT_ONCE)
    there = nth < QUERY_LEN
    token = tl.load(line + _TOKENS + nth, mask=there & is_new, other=0).to(tl.int64)
    chosen = tl.load(last + tl.maximum(behind, 0))
    token = tl.where((nth == QUERY_LEN - 1) & (behind >= 0), chosen, token)
    tl.store(token_ids + row * QUERY_LEN + nth, token, mask=there)
    tl.store(positions + row * QUERY_LEN + nth, (end - QUERY_LEN + nth).to(tl.int64), mask=there)
    tl.store(context_lens + row, end - QUERY_LEN)
    tl.store(stored_from + row, start)
    after = numbers + ((1 - half) * most + row) * _PAGES
    tl.store(after + _END, end + grows)
    tl.store(after + _START, start + grows)
    tl.store(after + _BEHIND, row)
    tl.store(after + _GROWS, grows)
    nth = tl.arange(0, _ASKED)
    news = tl.load(said_asked + (half * most + row) * _ASKED + nth, mask=is_new, other=0)
    asks = tl.where(is_new, news, tl.load(asked + source * _ASKED + nth))
    tl.store(asked_now + row * _ASKED + nth, asks)
    tl.store(asked + ((1 - half) * most + row) * _ASKED + nth, asks)
    table = tables + row.to(tl.int64) * max_blocks
    says = said_pages + (half * most + row).to(tl.int64) * max_blocks
    for first in range(0, tl.maximum(pages, 0), PAGES_AT_ONCE):
        block = first + tl.arange(0, PAGES_AT_ONCE)
        tl.store(table + block, tl.load(says + block, mask=block < pages), mask=block < pages)
    others = tables + (-1 - pages).to(tl.int64) * max_blocks
    for first in range(0, tl.where(pages < 0, max_blocks, 0), PAGES_AT_ONCE):
        block = first + tl.arange(0, PAGES_AT_ONCE)
        tl.store(table + block, tl.load(others + block, mask=block < max_blocks), mask=block < max_blocks)


@triton.jit
def _end(
    told, step_number, last, chosen, num_rows, half_width, QUERY_LEN: tl.constexpr, AT_ONCE: tl.constexpr
):  # fmt: skip
    step = tl.load(step_number)
    says = told + (step % 2) * 2 * half_width
    for first in range(0, num_rows, AT_ONCE):
        row = first + tl.arange(0, AT_ONCE)
        there = row < num_rows
        tl.store(says + row, tl.load(chosen + num_rows + row, mask=there), mask=there)
        tl.store(says + half_width + row, tl.load(chosen + 2 * num_rows + row, mask=there), mask=there)
        is_last = there & (row % QUERY_LEN == QUERY_LEN - 1)
        tl.store(last + row // QUERY_LEN, tl.load(chosen + row, mask=is_last), mask=is_last)
    tl.debug_barrier()
    tl.store(step_number, step + 1)


@triton.jit
def _retell(
    told, told_tops, step_number, last, chosen, tops, asked, num_rows, half_width, most, most_top, WIDTH: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    half = (tl.load(step_number) - 1) % 2
    if tl.load(asked + row * _ASKED + _TEMPERATURE).to(tl.float64, bitcast=True) > 0.0:
        says = told + half * 2 * half_width
        tl.store(last + row, tl.load(chosen + row))
        tl.store(says + row, tl.load(chosen + num_rows + row))
        tl.store(says + half_width + row, tl.load(chosen + 2 * num_rows + row))
    if tl.load(asked + row * _ASKED + _NUM_TOP) > 0:
        nth = tl.arange(0, WIDTH)
        there = nth < 2 * most_top
        top = tl.load(tops + row * 2 * most_top + nth, mask=there)
        tl.store(told_tops + (half * most + row) * 2 * most_top + nth, top, mask=there)
