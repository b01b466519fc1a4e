"""Greedy choices in one pass over the logits and a second over what each part of a row gave.

Sums are of the same parts in the same order whatever the number of rows, so a row's result hangs on no other.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.greedy_ref import NOT_FINITE

_COLUMNS = 4096
_NOT_FINITE = tl.constexpr(NOT_FINITE)
_NO_COLUMN = tl.constexpr((1 << 31) - 1)


def greedy(out: Tensor, logits: Tensor) -> None:
    """``greedy_ref``."""
    num_rows, vocab = logits.shape
    assert logits.stride(1) == out.stride(1) == 1
    parts = triton.cdiv(vocab, _COLUMNS)
    best = torch.empty(num_rows, parts, dtype=torch.float32, device=logits.device)
    total = torch.empty_like(best)
    place = torch.empty(num_rows, parts, dtype=torch.int32, device=logits.device)
    _part[(parts, num_rows)](logits, best, total, place, logits.stride(0), vocab, parts, COLUMNS=_COLUMNS, num_warps=8)
    _whole[(num_rows,)](out, best, total, place, out.stride(0), parts, PARTS=triton.next_power_of_2(parts), num_warps=1)


@triton.jit
def _part(logits, best, total, place, logits_row, vocab, num_parts, COLUMNS: tl.constexpr):
    part = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    there = column < vocab
    logit = tl.load(logits + row * logits_row + column, mask=there, other=float("-inf")).to(tl.float32)
    is_finite = tl.min(tl.where(there, (tl.abs(logit) < float("inf")).to(tl.int32), 1), axis=0) != 0
    largest = tl.max(logit, axis=0)
    first = tl.min(tl.where(there & (logit == largest), column, _NO_COLUMN), axis=0)
    own = row * num_parts + part
    tl.store(best + own, largest)
    tl.store(total + own, tl.sum(tl.exp(logit - largest), axis=0))
    tl.store(place + own, tl.where(is_finite, first, -1 - first))


@triton.jit
def _whole(out, best, total, place, out_row, num_parts, PARTS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    there = part < num_parts
    own = row * num_parts + part
    largest = tl.load(best + own, mask=there, other=float("-inf"))
    places = tl.load(place + own, mask=there, other=0)
    is_finite = tl.min(places, axis=0) >= 0
    first = tl.where(places < 0, -1 - places, places)
    most = tl.max(largest, axis=0)
    token = tl.min(tl.where(there & (largest == most), first, _NO_COLUMN), axis=0)
    token = tl.where(token == _NO_COLUMN, 0, token)  # of no number: told is that there is none
    sums = tl.load(total + own, mask=there, other=0.0) * tl.exp(largest - most)
    logprob = -tl.log(tl.sum(tl.where(there, sums, 0.0), axis=0))
    tl.store(out + row, token.to(tl.int64))
    tl.store(out + out_row + row, tl.where(is_finite, token, _NOT_FINITE).to(tl.int64))
    tl.store(out + 2 * out_row + row, logprob.to(tl.float64).to(tl.int64, bitcast=True))
