"""The assembly by which ``index_choice`` chooses blocks: what each step does, and why its outcome is exact.

A head's keys are in registers, so many a thread. Of up to 64 keys, one a thread, all are candidates. Of more, a
threshold that at least 16 of them reach, and few others do, says which are. Candidates are listed in the memory that
threads share and ranked by counting how many are better, each thread one.

The threshold only says how long the list is. Keys of which many are equal may all reach it: then halving what lies
between it and the highest key there can be finds one that fewer reach, at the latest between two blocks of equal keys.
A number behind a register's name is the thread's nth key.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

from pdkv_kernels.index_keys import HIDDEN, NAN
from pdkv_kernels.paged import BLOCK

MOST_PLACES = 16
"""The threshold is made for so many; fewer are the first of them."""
MOST_CANDIDATES = 128
"""Of the list, where there is a threshold. Of keys in no order about 25 reach it, of keys that rise from block to block
61. A short list finds room beside scans, which fill the memory that threads share."""
_LANES = 32
FEW_BLOCKS = 2 * _LANES
"""Blocks of a table whose keys are all compared."""
_KEYS = 8
"""Of a thread where there are more: two times four blocks side by side, which are read at once. On an H200 16 and 32
were slower, 4 where there are many programs with 1,024 blocks."""
_COUNT_AT, _LEADERS_AT = 0, 16
"""Bytes in the memory that threads share: the list's length, and each thread's best key. The list is behind them."""
_ENTRY = 8
"""Bytes of the list: the complement of a block below its key, so that entries order as blocks are preferred."""
_LOOKED_AT_FIRST = 24
"""Entries that are compared before anybody asks how many there are. Those that nobody wrote are below all others."""
_LOOKED_AT_ONCE = 8
_COUNT_FROM_ZERO = "mov.f32 above, 0f4B000000;  mov.f32 above_too, 0f00000000;"
_RANK = "add.f32 above, above, above_too;  mov.b32 rank, above;  and.b32 rank, rank, 65535;"
"""Floats count, whose adder the comparisons leave idle: from 2**23 on, the low bits of a float are a whole number."""
_BLOCKS = 1024
"""More than any block's number, where keys and blocks become one number that is halved."""


@dataclass(frozen=True)
class ChoiceCut:
    """What the assembly is written for."""

    warps: int  # 1, 2 or 4
    loaded: int  # keys of a row that may be read, a multiple of 4
    topk: int
    successor: int  # an ``index_selection.Successor``

    @property
    def threads(self) -> int:
        return _LANES * self.warps

    @property
    def lists_all(self) -> bool:
        """Whether every key is a candidate, in the order of blocks: one for each thread."""
        return self.loaded <= FEW_BLOCKS

    @property
    def keys(self) -> int:
        """Of a thread."""
        return 1 if self.lists_all else _KEYS

    @property
    def list_at(self) -> int:
        return 0 if self.lists_all else _LEADERS_AT + 4 * self.threads

    @property
    def shared_bytes(self) -> int:
        """Behind a list of candidates there is room for what one more thread would list."""
        return self.list_at + _ENTRY * (self.threads if self.lists_all else MOST_CANDIDATES + _KEYS)

    @property
    def barrier(self) -> str:
        return "bar.sync 0;" if self.warps > 1 else "bar.warp.sync -1;"

    def block(self, nth: int) -> int:
        """The block of a thread's nth key, less that of its first."""
        return nth // 4 * 4 * self.threads + nth % 4


def choice_cut(max_blocks: int, topk: int, successor: int) -> ChoiceCut:
    """For tables of so many blocks."""
    of_a_warp = _LANES if max_blocks <= FEW_BLOCKS else _LANES * _KEYS
    warps = 1 << ((max_blocks - 1) // of_a_warp).bit_length()
    return ChoiceCut(warps, -(-max_blocks // 4) * 4, topk, successor)


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
        ".reg .b32 shared_at, thread, lane, warp, at, first, length, num_blocks, left;",
        ".reg .b32 leader, other, higher, threshold, room_for, more, low, high;",
        ".reg .b32 count, ranked, candidate, warps_first, seen, rank, block, turn;",
        ".reg .f32 above, above_too;",
        ".reg .b64 keys_at, offset, mine, entry, next_entry, number, too_low, too_high;",
        *_wait_for_the_scan(cut),
        *_load_keys(cut),
        *_hide_what_the_row_does_not_see(cut),
        *(_rank_all(cut) if cut.lists_all else _rank_candidates(cut)),
        "END:",
        "mov.u32 $0, 0;",
        "}",
    ]
    return "\n".join(lines)


def _wait_for_the_scan(cut: ChoiceCut) -> Iterator[str]:
    """Empty the list, which is the program's own, and wait. What follows may start before, behind or at the end."""
    yield "mov.u32 thread, %tid.x;  and.b32 lane, thread, 31;  shr.u32 warp, thread, 5;  mov.u32 shared_at, room;"
    if cut.successor == 0:
        yield "griddepcontrol.launch_dependents;"
    yield f"shl.b32 first, thread, {0 if cut.lists_all else 2};"
    yield "mul.wide.u32 offset, first, 4;  add.s64 keys_at, offset, $1;"
    if not cut.lists_all:
        yield from _empty_the_list(cut)
    yield "griddepcontrol.wait;"
    if cut.successor == 1:
        yield "griddepcontrol.launch_dependents;"


def _empty_the_list(cut: ChoiceCut) -> Iterator[str]:
    yield "shl.b32 at, thread, 4;  add.u32 at, at, shared_at;"
    twos = MOST_CANDIDATES // 2
    for done in range(0, twos, cut.threads):
        when = "@yes " if done + cut.threads > twos else ""
        if when:
            yield f"setp.lt.u32 yes, thread, {twos - done};"
        yield f"{when}st.shared.v4.b32 [at+{cut.list_at + 16 * done}], {{0, {HIDDEN.value}, 0, {HIDDEN.value}}};"
    yield f"setp.eq.u32 yes, thread, 0;  @yes st.shared.b32 [shared_at+{_COUNT_AT}], 0;"
    yield cut.barrier


def _load_keys(cut: ChoiceCut) -> Iterator[str]:
    """All that the row has room for, whatever the length, which is asked for together with them."""
    side_by_side = 1 if cut.lists_all else 4
    for nth in range(0, cut.keys, side_by_side):
        keys = [f"key{nth + one}" for one in range(side_by_side)]
        names = f".v4.b32 {{{', '.join(keys)}}}" if len(keys) == 4 else f".b32 {keys[0]}"
        load = f"ld.global{names}, [keys_at+{4 * cut.block(nth)}];"
        threads = max(0, cut.loaded - cut.block(nth)) // side_by_side
        if threads >= cut.threads:
            yield load
        else:
            yield "  ".join(f"mov.b32 {key}, {HIDDEN.value};" for key in keys)
            yield f"setp.lt.u32 yes, thread, {threads};  @yes {load}"
    yield "ld.global.b32 length, [$2];"


def _hide_what_the_row_does_not_see(cut: ChoiceCut) -> Iterator[str]:
    """Keys behind the row's last block were left by others. A row in front of its sequence sees less than none."""
    yield f"add.s32 num_blocks, length, $3;  add.s32 num_blocks, num_blocks, {BLOCK - 1};"
    yield f"shr.s32 num_blocks, num_blocks, {BLOCK.bit_length() - 1};  sub.s32 left, num_blocks, first;"
    for nth in range(cut.keys):
        yield f"setp.gt.s32 yes, left, {cut.block(nth)};  selp.b32 key{nth}, key{nth}, {HIDDEN.value}, yes;"


# ---- few keys: each is compared to all


def _rank_all(cut: ChoiceCut) -> Iterator[str]:
    """Keys that the row does not see have the last ranks, in the order of blocks as any equal ones."""
    yield f"sub.s32 low, {0x7FFFFFFF}, thread;  mov.b64 mine, {{low, key0}};"
    yield f"shl.b32 at, thread, 3;  add.u32 at, at, shared_at;  st.shared.v2.b32 [at+{cut.list_at}], {{low, key0}};"
    yield cut.barrier
    yield _COUNT_FROM_ZERO
    yield from _count_those_above_mine("shared_at", cut.list_at, cut.threads)
    yield _RANK
    yield "setp.lt.s32 yes, thread, num_blocks;  selp.b32 block, thread, -1, yes;"
    yield from _take_the_place(cut)


# ---- more: those that reach a threshold are


def _rank_candidates(cut: ChoiceCut) -> Iterator[str]:
    yield from _threshold_of_leaders(cut)
    for nth in range(_KEYS):
        yield f"setp.ge.s32 listed{nth}, key{nth}, threshold;"
    yield from _list_candidates(cut)
    yield f"setp.gt.u32 yes, count, {MOST_CANDIDATES};  @yes bra CROWDED;"
    yield "RANK:"
    yield from _rank_by_counting(cut)
    yield "bra END;"
    yield "CROWDED:"
    yield from _threshold_between_blocks(cut)
    yield from _empty_the_list(cut)
    yield from _list_candidates(cut)
    yield "bra RANK;"


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
    yield "mov.u32 higher, 0;  mov.u32 more, 0;"
    for step in range(1, 16):
        total = "more" if step % 2 else "higher"
        yield f"shfl.sync.bfly.b32 other, leader, {2 * step}, 31, -1;"
        yield f"setp.gt.s32 yes, other, leader;  @yes add.s32 {total}, {total}, 1;"
    yield f"add.s32 higher, higher, more;  setp.lt.s32 yes, higher, 8;  selp.b32 other, leader, {0x7FFFFFFF}, yes;"
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
    yield from _load_of_all_warps(cut, "at")
    if cut.warps == 2:
        yield "max.s32 leader, better0, better1;"
    else:
        yield from _best_of_four()


def _load_of_all_warps(cut: ChoiceCut, base: str) -> Iterator[str]:
    """Words side by side, as many as warps, where the leaders lie."""
    words = ", ".join(f"better{nth}" for nth in range(cut.warps))
    yield f"ld.shared.v{cut.warps}.b32 {{{words}}}, [{base}+{_LEADERS_AT}];"


def _list_candidates(cut: ChoiceCut) -> Iterator[str]:
    """Threads with candidates take room in the list, in whatever order, and write them there. Who finds no room writes
    behind it, where nobody looks."""
    yield from _count_listed()
    yield "mov.u32 room_for, 0;  setp.ne.s32 yes, count, 0;"
    yield f"@yes atom.shared.add.u32 room_for, [shared_at+{_COUNT_AT}], count;"
    yield f"min.u32 room_for, room_for, {MOST_CANDIDATES};"
    yield f"shl.b32 at, room_for, {_ENTRY.bit_length() - 1};  add.u32 at, at, shared_at;"
    yield f"sub.s32 block, {0x7FFFFFFF}, first;"
    for nth in range(_KEYS):
        yield f"sub.s32 low, block, {cut.block(nth)};"
        yield f"@listed{nth} st.shared.v2.b32 [at+{cut.list_at}], {{low, key{nth}}};  @listed{nth} add.u32 at, at, 8;"
    yield cut.barrier
    yield f"ld.shared.b32 count, [shared_at+{_COUNT_AT}];"


def _count_listed() -> Iterator[str]:
    """The thread's own, in count."""
    yield "mov.u32 count, 0;  mov.u32 more, 0;"
    for nth in range(_KEYS):
        total = "more" if nth % 2 else "count"
        yield f"@listed{nth} add.s32 {total}, {total}, 1;"
    yield "add.s32 count, count, more;"


def _threshold_between_blocks(cut: ChoiceCut) -> Iterator[str]:
    """List what reaches a number that at least 16 and not too many do.

    A key and its block make one number, which no other block has. From too_low on there are too many, from too_high on
    fewer than 16, and in between there is a number with exactly 16 from it on: so halving ends.
    """
    yield f"mul.wide.s32 too_low, threshold, {_BLOCKS};  mov.u32 turn, 0;"
    yield f"mov.b64 too_high, {0x80000000 * _BLOCKS};"
    yield "HALVE:"
    yield "sub.s64 number, too_high, too_low;  shr.s64 number, number, 1;  add.s64 number, number, too_low;"
    for nth in range(_KEYS):
        yield f"sub.s32 block, {_BLOCKS - 1 - cut.block(nth)}, first;  mul.wide.s32 entry, key{nth}, {_BLOCKS};"
        yield "mul.wide.s32 next_entry, block, 1;  add.s64 entry, entry, next_entry;"
        yield f"setp.ge.s64 listed{nth}, entry, number;"
    yield from _count_listed()
    yield "redux.sync.add.s32 count, count, -1;"
    if cut.warps > 1:
        yield from _add_counts_of_all_warps(cut)
    yield f"setp.lt.u32 yes, count, {MOST_PLACES};  @yes mov.b64 too_high, number;  @yes bra HALVE;"
    yield f"setp.gt.u32 yes, count, {MOST_CANDIDATES};  @yes mov.b64 too_low, number;  @yes bra HALVE;"
    yield cut.barrier


def _add_counts_of_all_warps(cut: ChoiceCut) -> Iterator[str]:
    """Every other turn in another place: who is at it has seen all others write the one before, having read theirs."""
    yield "mad.lo.u32 at, warp, 4, turn;  add.u32 at, at, shared_at;"
    yield f"st.shared.b32 [at+{_LEADERS_AT}], count;"
    yield cut.barrier
    yield "add.u32 at, turn, shared_at;"
    yield from _load_of_all_warps(cut, "at")
    yield "sub.u32 turn, 16, turn;  add.s32 count, better0, better1;"
    if cut.warps == 4:
        yield "add.s32 better2, better2, better3;  add.s32 count, count, better2;"


def _rank_by_counting(cut: ChoiceCut) -> Iterator[str]:
    """Each thread a candidate: as many as are above it, so far down is its place, for no two entries are equal, and all
    that is above a candidate is in the list. Places for which there is no candidate get -1.

    All threads of a warp go round alike, also those whose candidates nobody wrote.
    """
    yield f"mov.u32 candidate, thread;  shl.b32 warps_first, warp, 5;  max.u32 ranked, count, {cut.topk};"
    yield "CANDIDATE:"
    yield "setp.ge.u32 yes, warps_first, ranked;  @yes bra END;"
    yield f"shl.b32 at, candidate, 3;  add.u32 at, at, shared_at;  ld.shared.b64 mine, [at+{cut.list_at}];"
    yield f"mov.u32 seen, {_LOOKED_AT_FIRST};  add.u32 at, shared_at, {cut.list_at + _ENTRY * _LOOKED_AT_FIRST};"
    yield _COUNT_FROM_ZERO
    yield from _count_those_above_mine("shared_at", cut.list_at, _LOOKED_AT_FIRST)
    yield "MORE:"
    yield "setp.ge.u32 yes, seen, count;  @yes bra RANKED;"
    yield from _count_those_above_mine("at", 0, _LOOKED_AT_ONCE)
    yield f"add.u32 seen, seen, {_LOOKED_AT_ONCE};  add.u32 at, at, {_ENTRY * _LOOKED_AT_ONCE};  bra MORE;"
    yield "RANKED:"
    yield f"mov.b64 {{low, high}}, mine;  sub.s32 block, {0x7FFFFFFF}, low;"
    yield _RANK
    yield "setp.lt.u32 yes, candidate, count;  selp.b32 rank, rank, candidate, yes;  selp.b32 block, block, -1, yes;"
    yield from _take_the_place(cut)
    yield f"add.u32 candidate, candidate, {cut.threads};  add.u32 warps_first, warps_first, {cut.threads};"
    yield "bra CANDIDATE;"


def _count_those_above_mine(base: str, at: int, entries: int) -> Iterator[str]:
    """Compare this many entries of the list with ``mine``."""
    for nth in range(0, entries, 2):
        yield f"ld.shared.v2.b64 {{entry, next_entry}}, [{base}+{at + _ENTRY * nth}];"
        yield "setp.gt.s64 yes, entry, mine;  setp.gt.s64 other_yes, next_entry, mine;"
        yield "@yes add.f32 above, above, 0f3F800000;  @other_yes add.f32 above_too, above_too, 0f3F800000;"


def _take_the_place(cut: ChoiceCut) -> Iterator[str]:
    """Write ``block`` to the place of this ``rank``, if there is one."""
    yield f"setp.lt.u32 yes, rank, {cut.topk};  mul.wide.u32 offset, rank, $5;  add.s64 offset, offset, $4;"
    yield "@yes st.global.b32 [offset], block;"
