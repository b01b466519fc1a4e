"""The choice of blocks in decode without sorting: up to 16 of a table of 65 to 1,024 blocks, on Hopper or later.

A sort compares and exchanges in many steps of which each waits for the one before. Here a program finds a threshold
that at least 16 of its keys reach and few others do, lists the blocks whose keys reach it, and ranks these by counting
how many are better, each thread one. The threshold only says how long the list is; the choice is exact, and the same
as ``index_selection``'s kernel makes.

It is one block of assembly in a Triton kernel, for Triton can neither append to a list that threads share nor count
into one. ``choice_ptx`` writes it, for a table's width; a number behind a register's name is the thread's nth key.

The worst case are keys of which nearly all are equal: then all are listed, and each is compared to each. That is slow.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_keys import HIDDEN, NAN
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK

MOST_PLACES = 16
"""The threshold is made for so many; fewer are the first of them."""
FEWEST_BLOCKS, MOST_BLOCKS = 65, 1024
MOST_PROGRAMS = 264
"""Two for each of an H200's multiprocessors. Their lists need memory that threads share, which scans fill: of more
programs most would wait for a place, and the next scan behind them."""
_LANES = 32
_KEYS = 8
"""Of a thread: two times four blocks side by side, which are read at once. On an H200 16 and 32 were slower, 4
where there are many programs with 1,024 blocks."""
_COUNT_AT, _LEADERS_AT = 0, 16
"""Bytes in the memory that threads share: the list's length, and each thread's best key. The list is behind them."""
_ENTRY = 8
"""Bytes of the list: the complement of a block below its key, so that entries order as blocks are preferred."""
_LOOKED_AT_FIRST = 24
"""Entries that are compared before anybody asks how many there are. Those that nobody wrote are below all others. Of
keys in no order about 25 are listed, of keys that rise from block to block 61."""
_LOOKED_AT_ONCE = 8


@dataclass(frozen=True)
class ChoiceCut:
    """What the assembly is written for."""

    warps: int  # 1, 2 or 4; each brings 256 keys
    loaded: int  # keys of a row that may be read, a multiple of 4
    topk: int
    successor: int  # an ``index_selection.Successor``

    @property
    def threads(self) -> int:
        return _LANES * self.warps

    @property
    def list_at(self) -> int:
        return _LEADERS_AT + 4 * self.threads

    @property
    def shared_bytes(self) -> int:
        return self.list_at + _ENTRY * _KEYS * self.threads

    @property
    def barrier(self) -> str:
        return "bar.sync 0;" if self.warps > 1 else "bar.warp.sync -1;"

    def block(self, nth: int) -> int:
        """The block of a thread's nth key, less four times the thread."""
        return nth // 4 * 4 * self.threads + nth % 4


def threshold_fits(out: Tensor, keys: Tensor, max_blocks: int) -> bool:
    """Whether ``choose_by_threshold`` takes tables of so many blocks, with rows of keys as the scan leaves them."""
    return (
        chained()
        and out.shape[0] * out.shape[1] <= MOST_PROGRAMS
        and FEWEST_BLOCKS <= max_blocks <= MOST_BLOCKS
        and out.shape[2] <= MOST_PLACES
        and keys.stride(0) % 4 == 0
        and keys.data_ptr() % 16 == 0
    )


def choose_by_threshold(out: Tensor, keys: Tensor, batch: DecodeBatch, successor: int) -> None:
    """``index_selection.select_blocks`` where ``threshold_fits`` and the scan has noted no groups."""
    num_rows, heads, topk = out.shape
    max_blocks = batch.page_table.shape[1]
    warps = max(1, triton.next_power_of_2(max_blocks) // (_LANES * _KEYS))
    cut = ChoiceCut(warps, -(-max_blocks // 4) * 4, topk, successor)
    _choose_kernel[(num_rows, heads)](
        keys,
        out,
        batch.seq_lens,
        batch.query_len,
        heads,
        keys.stride(0),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        PTX=choice_ptx(cut),
        **launch_options(True, warps, 1),
    )


@triton.jit(do_not_specialize=["query_len", "heads"])
def _choose_kernel(
    keys_ptr,  # int32 [num_rows * heads, max_blocks or more]
    out_ptr,  # int32 [num_rows, heads, topk]
    seq_lens_ptr,  # int32 [num_seqs]
    query_len,
    heads,
    keys_stride,
    out_row_stride,
    out_head_stride,
    out_place_stride,
    PTX: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    keys_at = keys_ptr + (row.to(tl.int64) * heads + head) * keys_stride
    out_at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
    length_at = seq_lens_ptr + row // query_len
    unseen = row % query_len + 1 - query_len
    tl.inline_asm_elementwise(
        PTX,
        "=r,l,l,r,l,r",
        [keys_at.to(tl.int64), length_at.to(tl.int64), unseen, out_at.to(tl.int64), out_place_stride * 4],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@lru_cache
def choice_ptx(cut: ChoiceCut) -> str:
    """The assembly: $0 is written for form's sake, $1 is the address of the keys, $2 of the sequence's length, $3 what
    to add to the length for this row, $4 the address of the first place, $5 the bytes from one place to the next."""
    lines = [
        "{",
        f".shared .align 16 .b8 room[{cut.shared_bytes}];",
        ".reg .pred yes, other_yes;",
        f".reg .pred listed<{_KEYS}>;",
        f".reg .b32 key<{_KEYS}>, better<4>;",
        ".reg .b32 shared_at, thread, lane, warp, at, length, num_blocks, left;",
        ".reg .b32 leader, other, above, threshold, room_for, more, block, low, high;",
        ".reg .b32 count, ranked, candidate, warps_first, seen, rank;",
        ".reg .f32 worse_than, worse_than_too;",
        ".reg .b64 keys_at, place_at, mine, entry, next_entry;",
        *_wait_for_the_scan(cut),
        *_load_keys(cut),
        *_hide_what_the_row_does_not_see(cut),
        *_threshold_of_leaders(cut),
        *_list_candidates(cut),
        *_rank_by_counting(cut),
        "mov.u32 $0, 0;",
        "}",
    ]
    return "\n".join(lines)


def _wait_for_the_scan(cut: ChoiceCut) -> Iterator[str]:
    """Empty the list, which is the program's own, and wait. What follows may start before, behind or at the end."""
    yield "mov.u32 thread, %tid.x;  and.b32 lane, thread, 31;  shr.u32 warp, thread, 5;  mov.u32 shared_at, room;"
    if cut.successor == 0:
        yield "griddepcontrol.launch_dependents;"
    yield "mul.wide.u32 keys_at, thread, 16;  add.s64 keys_at, keys_at, $1;"
    yield "shl.b32 at, thread, 4;  add.u32 at, at, shared_at;"
    for two in range(_KEYS // 2):
        yield f"st.shared.v4.b32 [at+{cut.list_at + 16 * cut.threads * two}], {{0, {HIDDEN.value}, 0, {HIDDEN.value}}};"
    yield f"setp.eq.u32 yes, thread, 0;  @yes st.shared.b32 [shared_at+{_COUNT_AT}], 0;"
    yield cut.barrier
    yield "griddepcontrol.wait;"
    if cut.successor == 1:
        yield "griddepcontrol.launch_dependents;"


def _load_keys(cut: ChoiceCut) -> Iterator[str]:
    """All that the row has room for, whatever the length, which is asked for together with them."""
    for first in range(0, _KEYS, 4):
        four = [f"key{first + nth}" for nth in range(4)]
        load = f"ld.global.v4.b32 {{{', '.join(four)}}}, [keys_at+{4 * cut.block(first)}];"
        threads = max(0, cut.loaded - cut.block(first)) // 4
        if threads >= cut.threads:
            yield load
        else:
            yield "  ".join(f"mov.b32 {key}, {HIDDEN.value};" for key in four)
            yield f"setp.lt.u32 yes, thread, {threads};  @yes {load}"
    yield "ld.global.b32 length, [$2];"


def _hide_what_the_row_does_not_see(cut: ChoiceCut) -> Iterator[str]:
    """Keys behind the row's last block were left by others. A row in front of its sequence sees less than none."""
    yield f"add.s32 num_blocks, length, $3;  add.s32 num_blocks, num_blocks, {BLOCK - 1};"
    yield f"shr.s32 num_blocks, num_blocks, {BLOCK.bit_length() - 1};"
    yield "shl.b32 at, thread, 2;  sub.s32 left, num_blocks, at;"
    for nth in range(_KEYS):
        yield f"setp.gt.s32 yes, left, {cut.block(nth)};  selp.b32 key{nth}, key{nth}, {HIDDEN.value}, yes;"


def _threshold_of_leaders(cut: ChoiceCut) -> Iterator[str]:
    """A key that at least 16 visible keys reach, or else one that all do.

    Each lane takes the best key of one of 32 groups, whose leader it is. At least eight leaders of even lanes reach the
    eighth best of these, and eight of odd lanes theirs; so 16 keys reach the lesser of both, and it is at most the 16th
    best of all: what is below it has no place. A leader is among the best eight where fewer than eight of its half are
    above it; equal ones are not. To compare all 32 takes twice the exchanges and was no faster on the whole.

    Where fewer groups have a visible block, what remains is the lowest key of such a block, NaN's.
    """
    for nth in range(4):
        yield f"max.s32 better{nth}, key{2 * nth}, key{2 * nth + 1};"
    yield from _best_of_four()
    if cut.warps > 1:
        yield from _leaders_of_all_warps(cut)
    yield "mov.u32 above, 0;  mov.u32 more, 0;"
    for step in range(1, 16):
        total = "more" if step % 2 else "above"
        yield f"shfl.sync.bfly.b32 other, leader, {2 * step}, 31, -1;"
        yield f"setp.gt.s32 yes, other, leader;  @yes add.s32 {total}, {total}, 1;"
    yield f"add.s32 above, above, more;  setp.lt.s32 yes, above, 8;  selp.b32 other, leader, {0x7FFFFFFF}, yes;"
    yield f"redux.sync.min.s32 threshold, other, -1;  max.s32 threshold, threshold, {NAN.value};"


def _best_of_four() -> Iterator[str]:
    yield "max.s32 better0, better0, better1;  max.s32 better2, better2, better3;  max.s32 leader, better0, better2;"


def _leaders_of_all_warps(cut: ChoiceCut) -> Iterator[str]:
    """Each lane takes the best of the threads that are the same lane of their warps. These lie side by side in memory,
    so that one load brings them; all warps come to the same."""
    yield f"mad.lo.u32 at, lane, {cut.warps}, warp;  shl.b32 at, at, 2;  add.u32 at, at, shared_at;"
    yield f"st.shared.b32 [at+{_LEADERS_AT}], leader;"
    yield cut.barrier
    yield f"mad.lo.u32 at, lane, {4 * cut.warps}, shared_at;"
    if cut.warps == 2:
        yield f"ld.shared.v2.b32 {{better0, better1}}, [at+{_LEADERS_AT}];  max.s32 leader, better0, better1;"
    else:
        yield f"ld.shared.v4.b32 {{better0, better1, better2, better3}}, [at+{_LEADERS_AT}];"
        yield from _best_of_four()


def _list_candidates(cut: ChoiceCut) -> Iterator[str]:
    """Threads that hold keys from the threshold on take room in the list, in whatever order, and write them there."""
    yield "mov.u32 count, 0;  mov.u32 more, 0;  mov.u32 room_for, 0;"
    for nth in range(_KEYS):
        total = "more" if nth % 2 else "count"
        yield f"setp.ge.s32 listed{nth}, key{nth}, threshold;  @listed{nth} add.s32 {total}, {total}, 1;"
    yield "add.s32 count, count, more;  setp.ne.s32 yes, count, 0;"
    yield f"@yes atom.shared.add.u32 room_for, [shared_at+{_COUNT_AT}], count;"
    yield f"shl.b32 at, room_for, {_ENTRY.bit_length() - 1};  add.u32 at, at, shared_at;"
    yield f"shl.b32 block, thread, 2;  sub.s32 block, {0x7FFFFFFF}, block;"
    for nth in range(_KEYS):
        yield f"sub.s32 low, block, {cut.block(nth)};"
        yield f"@listed{nth} st.shared.v2.b32 [at+{cut.list_at}], {{low, key{nth}}};  @listed{nth} add.u32 at, at, 8;"
    yield cut.barrier
    yield f"ld.shared.b32 count, [shared_at+{_COUNT_AT}];"


def _rank_by_counting(cut: ChoiceCut) -> Iterator[str]:
    """Each thread a candidate: as many as are above it, so far down is its place, for no two entries are equal, and all
    that is above a candidate is in the list. Places for which there is no candidate get -1.

    Floats count, whose adder the comparisons leave idle: from 2**23 on, the low bits of a float are a whole number. All
    threads of a warp go round alike, also those whose candidates nobody wrote.
    """
    yield f"mov.u32 candidate, thread;  shl.b32 warps_first, warp, 5;  max.u32 ranked, count, {cut.topk};"
    yield "CANDIDATE:"
    yield "setp.ge.u32 yes, warps_first, ranked;  @yes bra END;"
    yield f"shl.b32 at, candidate, 3;  add.u32 at, at, shared_at;  ld.shared.b64 mine, [at+{cut.list_at}];"
    yield "mov.f32 worse_than, 0f4B000000;  mov.f32 worse_than_too, 0f00000000;"
    for nth in range(0, _LOOKED_AT_FIRST, 2):
        yield from _compare_two("shared_at", cut.list_at + _ENTRY * nth)
    yield f"mov.u32 seen, {_LOOKED_AT_FIRST};  add.u32 at, shared_at, {cut.list_at + _ENTRY * _LOOKED_AT_FIRST};"
    yield "MORE:"
    yield "setp.ge.u32 yes, seen, count;  @yes bra RANKED;"
    for nth in range(0, _LOOKED_AT_ONCE, 2):
        yield from _compare_two("at", _ENTRY * nth)
    yield f"add.u32 seen, seen, {_LOOKED_AT_ONCE};  add.u32 at, at, {_ENTRY * _LOOKED_AT_ONCE};  bra MORE;"
    yield "RANKED:"
    yield "add.f32 worse_than, worse_than, worse_than_too;  mov.b32 rank, worse_than;  and.b32 rank, rank, 65535;"
    yield f"mov.b64 {{low, high}}, mine;  sub.s32 block, {0x7FFFFFFF}, low;"
    yield "setp.lt.u32 yes, candidate, count;  selp.b32 rank, rank, candidate, yes;  selp.b32 block, block, -1, yes;"
    yield f"setp.lt.u32 yes, rank, {cut.topk};  mul.wide.u32 place_at, rank, $5;  add.s64 place_at, place_at, $4;"
    yield "@yes st.global.b32 [place_at], block;"
    yield f"add.u32 candidate, candidate, {cut.threads};  add.u32 warps_first, warps_first, {cut.threads};"
    yield "bra CANDIDATE;"
    yield "END:"


def _compare_two(base: str, offset: int) -> Iterator[str]:
    """Entries side by side with ``mine``."""
    yield f"ld.shared.v2.b64 {{entry, next_entry}}, [{base}+{offset}];"
    yield "setp.gt.s64 yes, entry, mine;  setp.gt.s64 other_yes, next_entry, mine;"
    yield "@yes add.f32 worse_than, worse_than, 0f3F800000;"
    yield "@other_yes add.f32 worse_than_too, worse_than_too, 0f3F800000;"
