"""Draws in a fixed few launches: no sort, no wait for the host, and sums in one order whatever the company.

A row is cut into parts of so many columns. Where ``top_p`` cuts, the logit at which it does is found four bits at a
time: each launch sums the weights of every part by the next four bits of what is still in question, and the one behind
it goes on from there. Then every part's weight that is left, then the part and the column in which the number falls.

Weights are exponentials in float32; sums of parts by digits are too, all others in float64. What a row gives hangs on
its logits and on what is asked of it, and on no other row, nor on how many there are.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.draw_ref import ASKED, NUM_TOP, SEED, TEMPERATURE, TOP_P

_COLUMNS = 4096
_MANY_ROWS, _PARTS_AT_ONCE = 32, 4
"""Where there are many rows, programs are of several parts, one after the other, each with its own sums."""
_BITS = tl.constexpr(4)
_DIGITS = tl.constexpr(1 << 4)
_CUT = tl.constexpr(2)
"""Of every part, what of it is in the nucleus: keys from the first number on, but of those equal to it only the first,
so many as the second says; negative: all."""
_STATE = tl.constexpr(4)
"""Of every row and pass: digits that are known, bits of the weight above, bits of the weight wanted. The fourth is
nobody's: so all begin at addresses of one kind, and one kernel is compiled for them."""
_NO_COLUMN = tl.constexpr((1 << 31) - 1)
_MOST_EQUALS = tl.constexpr(float(1 << 30))
_COLUMNS_ASKED = tuple(tl.constexpr(column) for column in (TEMPERATURE, TOP_P, SEED, NUM_TOP, ASKED))
_TEMPERATURE, _TOP_P, _SEED, _NUM_TOP, _ASKED = _COLUMNS_ASKED


def draw(chosen: Tensor, tops: Tensor, logits: Tensor, asked: Tensor, positions: Tensor) -> None:
    """``draw_ref``; of equally likely tokens to tell of, the lowest come first."""
    num_rows, vocab = logits.shape
    most_top = tops.shape[2]
    assert logits.stride(1) == chosen.stride(1) == positions.stride(0) == 1
    assert asked.is_contiguous()
    assert tops.is_contiguous()
    parts = triton.cdiv(vocab, _COLUMNS)
    key_bits = 16 if logits.dtype == torch.bfloat16 else 32
    passes = key_bits // _BITS.value

    def scratch(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=logits.device)

    state = scratch(passes, num_rows, _STATE.value)
    sums = scratch(2, num_rows, parts, _DIGITS.value, dtype=torch.float32)
    left = scratch(num_rows, parts, dtype=torch.float64)
    cuts = scratch(num_rows, parts, _CUT.value)
    likely = scratch(num_rows, parts, most_top)
    sizes = (chosen.stride(0), logits.stride(0), vocab, parts)
    shape = {"KEY_BITS": key_bits, "COLUMNS": _COLUMNS, "PARTS": triton.next_power_of_2(parts)}
    at_once = 1 if num_rows < _MANY_ROWS else _PARTS_AT_ONCE
    grid = (triton.cdiv(parts, at_once), num_rows)
    for number in range(passes):
        before, after = sums[(number + 1) % 2], sums[number % 2]
        _narrow[grid](
            chosen, logits, asked, state[number - 1], state[number], before, after, number * _BITS.value, at_once,
            *sizes, **shape, num_warps=4,
        )  # fmt: skip
    _weigh[grid](
        chosen, logits, asked, state[-1], sums[(passes - 1) % 2], left, cuts, likely, most_top, at_once, *sizes,
        **shape, num_warps=8,
    )  # fmt: skip
    _pick[(num_rows,)](
        chosen, tops, logits, asked, positions, left, cuts, likely, most_top, *sizes,
        WIDTH=triton.next_power_of_2(most_top), **shape, num_warps=8,
    )  # fmt: skip


@triton.jit
def _float64(bits):
    return bits.to(tl.float64, bitcast=True)


@triton.jit
def _bits(value):
    return value.to(tl.int64, bitcast=True)


@triton.jit
def _key(logit, KEY_BITS: tl.constexpr):
    """uint32 of so many bits, ordered as the logits are, of which one of bfloat16 has 16 that are all the same."""
    bits = tl.where(logit == 0.0, 0.0, logit).to(tl.int32, bitcast=True)
    key = (bits ^ ((bits >> 31) | -(1 << 31))).to(tl.uint32, bitcast=True)
    return key >> (32 - KEY_BITS)


@triton.jit
def _logit(key, KEY_BITS: tl.constexpr):
    """Of which ``_key``, here as int64, is."""
    low = (1 << (32 - KEY_BITS)) - 1
    whole = (key << (32 - KEY_BITS)) + tl.where(key < (1 << (KEY_BITS - 1)), low, 0)
    bits = tl.where(whole < (1 << 31), -1 - whole, whole - (1 << 31))
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _sharpness(temperature):
    return (1.0 / tl.maximum(temperature, 1e-30)).to(tl.float32)


@triton.jit
def _weight(logit, largest, sharpness):
    """float32, at most 1."""
    return tl.exp((logit - largest) * sharpness)


@triton.jit
def _reach(largest, temperature, share, vocab, KEY_BITS: tl.constexpr):
    """A key that nothing in the nucleus is below, since all tokens there together have less weight than is left out;
    and how far the largest key is above it. int64 both."""
    room = tl.log(tl.zeros([], tl.float32) + vocab) - tl.log(tl.maximum(1.0 - share, 1e-30).to(tl.float32)) + 1.0
    base = _key(largest - temperature.to(tl.float32) * room, KEY_BITS).to(tl.int64)
    return base, _key(largest, KEY_BITS).to(tl.int64) - base


@triton.jit
def _largest(chosen, logits, row, logits_row):
    """Of the row's logits: greedy has found it."""
    return tl.load(logits + row * logits_row + tl.load(chosen + row)).to(tl.float32)


@triton.jit
def _loaded(logits, row, part, logits_row, vocab, COLUMNS: tl.constexpr):
    """A part's columns, and their logits."""
    column = part * COLUMNS + tl.arange(0, COLUMNS)
    found = tl.load(logits + row * logits_row + column, mask=column < vocab, other=float("-inf"))
    return column, found.to(tl.float32)


@triton.jit
def _descended(state, sums, share, row, num_parts, is_first, PARTS: tl.constexpr):
    """What is known behind a pass of a row, its first or a later one: the digits, the weight above them, the weight
    wanted, and the weight that has those digits in every part.

    The last token in the nucleus is of the lowest digit that has any weight, and before which less than is wanted has
    come."""
    digit = tl.arange(0, _DIGITS)
    nth = tl.arange(0, PARTS)
    of_parts = sums + (row * num_parts + nth[:, None]) * _DIGITS + digit[None, :]
    weights = tl.load(of_parts, mask=nth[:, None] < num_parts, other=0.0).to(tl.float64)
    weight = tl.sum(weights, axis=0)
    key = tl.zeros([], tl.int64)
    above = tl.zeros([], tl.float64)
    wanted = tl.maximum(share * tl.sum(weight, axis=0), 1e-300)  # the likeliest is always in
    if is_first == 0:
        key = tl.load(state + row * _STATE)
        above = _float64(tl.load(state + row * _STATE + 1))
        wanted = _float64(tl.load(state + row * _STATE + 2))
    higher = tl.where(digit[:, None] > digit[None, :], tl.reshape(weight, (_DIGITS, 1)), 0.0)
    before = above + tl.sum(higher, axis=0)
    last = tl.min(tl.where((weight > 0.0) & (before < wanted), digit, _DIGITS - 1), axis=0)
    above = tl.sum(tl.where(digit == last, before, 0.0), axis=0)
    by_part = tl.sum(tl.where(digit[None, :] == last, weights, 0.0), axis=1)
    return key * _DIGITS + last, above, wanted, by_part


@triton.jit(do_not_specialize=["known_bits", "at_once", "chosen_row"])
def _narrow(
    chosen, logits, asked, state_before, state, sums_before, sums, known_bits, at_once, chosen_row, logits_row, vocab,
    num_parts, KEY_BITS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Sum weights of parts by the next digit of their keys' heights above what is in reach, where the digits before are
    those of the nucleus's end. Passes whose digit is 0 in all that is in reach have nothing to do."""
    first = tl.program_id(0) * at_once
    row = tl.program_id(1).to(tl.int64)
    temperature = _float64(tl.load(asked + row * _ASKED + _TEMPERATURE))
    share = _float64(tl.load(asked + row * _ASKED + _TOP_P))
    if (temperature > 0.0) & (share < 1.0) & (tl.load(chosen + chosen_row + row) >= 0):
        largest = _largest(chosen, logits, row, logits_row)
        base, span = _reach(largest, temperature, share, vocab, KEY_BITS)
        unknown = KEY_BITS - known_bits
        shift = unknown - _BITS
        known = tl.zeros([], tl.int64)
        nth = tl.arange(0, PARTS)
        by_part = tl.full([PARTS], 1.0, tl.float64)
        if (span >> unknown) > 0:
            is_second = (span >> (unknown + _BITS)) == 0
            known, above, wanted, by_part = _descended(
                state_before, sums_before, share, row, num_parts, is_second.to(tl.int32), PARTS
            )
            if first == 0:
                tl.store(state + row * _STATE, known)
                tl.store(state + row * _STATE + 1, _bits(above))
                tl.store(state + row * _STATE + 2, _bits(wanted))
        end = tl.where((shift == 0) | ((span >> shift) > 0), tl.minimum(first + at_once, num_parts), first)
        lowest, digits_known = base.to(tl.uint32), (known * _DIGITS).to(tl.uint32)
        below = tl.where((span >> unknown) > 0, 0xFFFFFFFF, 0).to(tl.uint32)  # out of reach, and of the first sum
        sharpness = _sharpness(temperature)
        for part in range(first, end):
            mine = sums + (row * num_parts + part) * _DIGITS
            if tl.sum(tl.where(nth == part, by_part, 0.0), axis=0) > 0.0:
                _, logit = _loaded(logits, row, part, logits_row, vocab, COLUMNS)
                weight = _weight(logit, largest, sharpness)  # behind the last column 0
                key = _key(logit, KEY_BITS)
                height = tl.where(key >= lowest, key - lowest, below)
                digit = (height >> shift.to(tl.uint32)) - digits_known  # others are no digits
                for one in tl.static_range(0, _DIGITS):
                    tl.store(mine + one, tl.sum(tl.where(digit == one, weight, 0.0), axis=0))
            else:
                tl.store(mine + tl.arange(0, _DIGITS), tl.zeros([_DIGITS], tl.float32))


@triton.jit
def _kept(key, lowest, few):
    """Of a part's keys, which are in the nucleus: as ``_CUT`` says."""
    kept = key >= lowest.to(tl.uint32)
    if few >= 0:
        is_equal = key == lowest.to(tl.uint32)
        kept = kept & ((key != lowest.to(tl.uint32)) | (tl.cumsum(is_equal.to(tl.int32), axis=0) <= few))
    return kept


@triton.jit(do_not_specialize=["at_once", "chosen_row"])
def _weigh(
    chosen, logits, asked, state, sums, left, cuts, likely, most_top, at_once, chosen_row, logits_row, vocab, num_parts,
    KEY_BITS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The weight that parts of a row have left, and their likeliest columns."""
    begin = tl.program_id(0) * at_once
    row = tl.program_id(1).to(tl.int64)
    temperature = _float64(tl.load(asked + row * _ASKED + _TEMPERATURE))
    share = _float64(tl.load(asked + row * _ASKED + _TOP_P))
    num_top = tl.minimum(tl.load(asked + row * _ASKED + _NUM_TOP), most_top).to(tl.int32)
    is_sound = tl.load(chosen + chosen_row + row) >= 0
    draws = is_sound & (temperature > 0.0)
    if draws | (is_sound & (num_top > 0)):
        largest = _largest(chosen, logits, row, logits_row)
        sharpness = _sharpness(temperature)
        nth = tl.arange(0, PARTS)
        lowest = tl.zeros([], tl.int64)
        most_equals = tl.full([], _MOST_EQUALS, tl.float64)
        equals = tl.zeros([PARTS], tl.float64)  # how many in every part
        if draws & (share < 1.0):
            base, span = _reach(largest, temperature, share, vocab, KEY_BITS)
            is_first = (span >> _BITS) == 0
            height, above, wanted, equals = _descended(state, sums, share, row, num_parts, is_first.to(tl.int32), PARTS)
            lowest = base + height
            each = tl.maximum(_weight(_logit(lowest, KEY_BITS), largest, sharpness).to(tl.float64), 1e-300)
            most_equals = tl.ceil(tl.minimum((wanted - above) / each, _MOST_EQUALS))
            equals = tl.floor(equals / each + 0.5)
        for part in range(begin, tl.minimum(begin + at_once, num_parts)):
            column, logit = _loaded(logits, row, part, logits_row, vocab, COLUMNS)
            own = row * num_parts + part
            if draws:
                room = most_equals - tl.sum(tl.where(nth < part, equals, 0.0), axis=0)
                is_cut = (room > 0.0) & (tl.sum(tl.where(nth == part, equals, 0.0), axis=0) > room)
                few = tl.where(is_cut, room, -1.0).to(tl.int64)
                from_here = lowest + tl.where(room > 0.0, 0, 1)
                kept = (column < vocab) & _kept(_key(logit, KEY_BITS), from_here, few)
                weight = tl.where(kept, _weight(logit, largest, sharpness), 0.0).to(tl.float64)
                tl.store(left + own, tl.sum(weight, axis=0))
                tl.store(cuts + own * _CUT, from_here)
                tl.store(cuts + own * _CUT + 1, few)
            for number in range(0, num_top):
                best = tl.max(logit, axis=0)
                is_best = (logit == best) & (logit > float("-inf"))
                found = tl.min(tl.where(is_best, column, _NO_COLUMN), axis=0)
                tl.store(likely + own * most_top + number, found.to(tl.int64))
                logit = tl.where(column == found, float("-inf"), logit)


@triton.jit
def _round(first, second, third, fourth, key, other_key):
    """Of Philox with four words of 64 bits."""
    one = tl.full([], 0xD2E7470EE14C6C93, tl.uint64)
    other = tl.full([], 0xCA5A826395121157, tl.uint64)
    high, low = tl.umulhi(one, first), one * first
    other_high, other_low = tl.umulhi(other, third), other * third
    return other_high ^ second ^ key, other_low, high ^ fourth ^ other_key, low


@triton.jit
def _uniform(seed, position):
    """``draw_ref.uniform``."""
    key, other_key = seed.to(tl.uint64), position.to(tl.uint64)
    first, second = tl.full([], 1, tl.uint64), tl.full([], 0, tl.uint64)
    third, fourth = tl.full([], 0, tl.uint64), tl.full([], 0, tl.uint64)
    for _ in tl.static_range(0, 10):
        first, second, third, fourth = _round(first, second, third, fourth, key, other_key)
        key += tl.full([], 0x9E3779B97F4A7C15, tl.uint64)
        other_key += tl.full([], 0xBB67AE8584CAA73B, tl.uint64)
    return (first >> 11).to(tl.int64).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit(do_not_specialize=["chosen_row"])
def _pick(
    chosen, tops, logits, asked, positions, left, cuts, likely, most_top, chosen_row, logits_row, vocab, num_parts,
    WIDTH: tl.constexpr, KEY_BITS: tl.constexpr, COLUMNS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """The column in which the row's number falls, and the likeliest of all parts."""
    row = tl.program_id(0).to(tl.int64)
    temperature = _float64(tl.load(asked + row * _ASKED + _TEMPERATURE))
    num_top = tl.minimum(tl.load(asked + row * _ASKED + _NUM_TOP), most_top).to(tl.int32)
    is_sound = tl.load(chosen + chosen_row + row) >= 0
    nth = tl.arange(0, PARTS)
    if is_sound & ((temperature > 0.0) | (num_top > 0)):
        largest = _largest(chosen, logits, row, logits_row)
        most = _float64(tl.load(chosen + 2 * chosen_row + row))
        if num_top > 0:
            place = tl.arange(0, WIDTH)
            is_told = (nth[:, None] < num_parts) & (place[None, :] < num_top)
            of_parts = likely + (row * num_parts + nth[:, None]) * most_top + place[None, :]
            column = tl.load(of_parts, mask=is_told, other=_NO_COLUMN)
            is_told = is_told & (column < vocab)
            logit = tl.load(logits + row * logits_row + column, mask=is_told, other=float("-inf")).to(tl.float32)
            for number in range(0, num_top):
                best = tl.max(tl.max(logit, axis=1), axis=0)
                equals = tl.where(is_told & (logit == best), column, _NO_COLUMN)
                first = tl.min(tl.min(equals, axis=1), axis=0)
                logprob = (best - largest).to(tl.float64) + most
                is_there = best > float("-inf")
                tl.store(tops + row * 2 * most_top + number, first, mask=is_there)
                tl.store(tops + (row * 2 + 1) * most_top + number, _bits(logprob), mask=is_there)
                logit = tl.where(column == first, float("-inf"), logit)
        if temperature > 0.0:
            seed = tl.load(asked + row * _ASKED + _SEED)
            number = _uniform(seed, tl.load(positions + row) + 1)
            weights = tl.load(left + row * num_parts + nth, mask=nth < num_parts, other=0.0)
            up_to = tl.cumsum(weights, axis=0)
            target = tl.max(up_to, axis=0) * number
            part = tl.min(tl.where((weights > 0.0) & (up_to > target), nth, PARTS), axis=0)
            part = tl.minimum(part, tl.max(tl.where(weights > 0.0, nth, 0), axis=0))
            rest = target - tl.max(tl.where(nth < part, up_to, 0.0), axis=0)
            column, logit = _loaded(logits, row, part, logits_row, vocab, COLUMNS)
            cut = cuts + (row * num_parts + part) * _CUT
            kept = (column < vocab) & _kept(_key(logit, KEY_BITS), tl.load(cut), tl.load(cut + 1))
            weight = tl.where(kept, _weight(logit, largest, _sharpness(temperature)), 0.0).to(tl.float64)
            is_beyond = (weight > 0.0) & (tl.cumsum(weight, axis=0) > rest)
            token = tl.min(tl.where(is_beyond, column, _NO_COLUMN), axis=0)
            token = tl.minimum(token, tl.max(tl.where(weight > 0.0, column, 0), axis=0))  # sums round in another order
            logprob = tl.max(tl.where(column == token, logit, float("-inf")), axis=0) - largest
            tl.store(chosen + row, token.to(tl.int64))
            tl.store(chosen + chosen_row + row, token.to(tl.int64))
            tl.store(chosen + 2 * chosen_row + row, _bits(logprob.to(tl.float64) + most))
