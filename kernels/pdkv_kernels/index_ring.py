"""The scan of ``index_scan`` where what it reads is settled: a ring of tiles that is full before the program's turn.

Triton pipelines a loop with all that is in it. A scan that reads its tiles in front of its turn and its queries in it
must read these inside the loop; so every tile would turn the queries into the matrix units' order anew, which takes
1 to 2 us a call. Gluon says what happens when: the ring is filled, the program waits for its turn, reads the queries,
and the loop does nothing but tiles. For Hopper; elsewhere, and for more columns, ``index_scan`` has a kernel that can
do all of it.

Before its turn a program asks for a tile when the one before it has come. All programs' single tiles keep the memory
busy; whole rings would stand in a queue that what still runs in front, a selection between two scans above all, waits
behind with every read and store, though these meet the cache.

A tile is a block's keys or an equal part of them. The memory is kept busy by the tiles that are asked for and have not
come, so programs of one or two warps give a tile's place to another as soon as the tile is in registers, before they
multiply it. They need more registers for that, which programs of four warps had better leave to what runs beside them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.hardware import hardware
from pdkv_kernels.index_keys import HIDDEN, INIT, LOCAL, NAN
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.paged import BLOCK
from pdkv_kernels.ring_layout import in_every_warp

_DTYPES = {torch.bfloat16: gl.bfloat16, torch.float8_e4m3fn: gl.float8e4nv, torch.float8_e5m2: gl.float8e5}
_DIM = 128
_COLUMNS = 8
"""Of a matrix product: that many heads and query rows of a sequence at most."""
_WINDOW = gl.constexpr(32)
"""Pages that a program looks up at once."""
_SECTOR_BITS = gl.constexpr(8 * 32)
"""What a request to the second-level cache brings at least."""
_FURTHEST = 1 << 31
"""Lines of ``_DIM`` numbers that a request for a tile can count."""


@dataclass(frozen=True)
class RingPlan:
    """How a program reads its blocks."""

    tokens: int  # of a tile: BLOCK or a power of two that divides it, 16 or more for each warp
    slots: int  # tiles that are on their way to a program at once
    num_warps: int
    programs: int  # of a multiprocessor, which fill it by the memory that threads share
    behind: int = 0
    """Blocks of a program's that are left when what follows may start; 0: it may at once."""


def ring_fits(index_q: Tensor, index_k: Tensor, batch: DecodeBatch) -> bool:
    """Whether ``scan_by_ring`` takes this batch. It needs its promise, Hopper, and M3's dimension in one of its dtypes.

    Tiles must be one run of bytes each, whole lines of it apart, so that one request brings one.
    """
    page, line, _ = index_k.stride()
    columns = triton.next_power_of_2(index_q.shape[1]) * triton.next_power_of_2(batch.query_len)
    return (
        batch.settled
        and chained()
        and hardware().capability < 100
        and index_q.dtype == index_k.dtype
        and index_k.dtype in _DTYPES
        and line == index_k.shape[2] == _DIM
        and page % _DIM == index_k.data_ptr() % 16 == 0
        and index_k.shape[0] * (page // _DIM) < _FURTHEST
        and columns < _COLUMNS
    )


def scan_by_ring(
    found: tuple[Tensor, Tensor],
    index_q: Tensor,
    index_k: Tensor,
    batch: DecodeBatch,
    forced: tuple[int, int],
    cut: tuple[int, int],
    plan: RingPlan,
) -> None:
    """``index_scan.scan_blocks`` where ``ring_fits``; found: its keys and leaders, cut: its splits and group length."""
    keys, leaders = found
    splits, group = cut
    _, heads, dim = index_q.shape
    query_tile = triton.next_power_of_2(batch.query_len)
    page_lines = index_k.stride(0) // dim
    lines = (index_k.shape[0] - 1) * page_lines + BLOCK
    layout = gl.NVMMASharedLayout.get_default_for([plan.tokens, dim], _DTYPES[index_k.dtype])
    tiles = TensorDescriptor(index_k, [lines, dim], [dim, 1], [plan.tokens, dim], layout)
    _ring_kernel[(batch.num_seqs, splits)](
        index_q,
        tiles,
        keys,
        leaders,
        batch.page_table,
        batch.seq_lens,
        splits,
        batch.query_len,
        *forced,
        index_q.stride(0),
        index_q.stride(1),
        page_lines,
        keys.stride(0),
        leaders.stride(0),
        batch.page_table.stride(0),
        batch.page_table.shape[1],
        HEADS=heads,
        QUERY_TILE=query_tile,
        COLUMNS=_COLUMNS,
        DIM=dim,
        TOKENS=BLOCK,
        GROUP=group,
        TILE=plan.tokens,
        SLOTS=plan.slots,
        BEHIND=plan.behind,
        WARPS=plan.num_warps,
        **launch_options(early=True, num_warps=plan.num_warps, num_stages=1),
    )


@gluon.jit(do_not_specialize=["splits", "query_len", "init_blocks", "local_blocks", "max_blocks", "page_lines"])
def _ring_kernel(
    q_ptr,  # [num_rows, heads, DIM]
    tiles,  # descriptor of all lines of DIM index keys from the first page's first to the last page's last
    keys_ptr,  # int32 [num_rows * heads, max_blocks or group_count * GROUP], out
    leaders_ptr,  # int64 [num_rows * heads, group_count], out
    page_table_ptr,  # int32 [num_seqs, max_blocks]
    seq_lens_ptr,  # int32 [num_seqs]
    splits,
    query_len,
    init_blocks,
    local_blocks,
    q_row_stride,
    q_head_stride,
    page_lines,  # from one page's first line to the next page's
    keys_stride,
    leaders_stride,
    table_stride,
    max_blocks,
    HEADS: gl.constexpr,
    QUERY_TILE: gl.constexpr,
    COLUMNS: gl.constexpr,
    DIM: gl.constexpr,
    TOKENS: gl.constexpr,
    GROUP: gl.constexpr,  # 1: no groups
    TILE: gl.constexpr,  # tokens of a request
    SLOTS: gl.constexpr,
    BEHIND: gl.constexpr,  # 0: what follows may start at once
    WARPS: gl.constexpr,
):
    BITS: gl.constexpr = tiles.dtype.primitive_bitwidth
    BYTES: gl.constexpr = TILE * DIM * BITS // 8
    TILES: gl.constexpr = TOKENS // TILE  # of a block
    FEW_WARPS: gl.constexpr = WARPS < 4
    HALF: gl.constexpr = gl.float16 if BITS == 8 else tiles.dtype  # which holds every 8-bit float exactly
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [WARPS, 1], [16, 8])
    K_SIDE: gl.constexpr = gl.DotOperandLayout(0, SUMS, 32 // BITS)
    Q_SIDE: gl.constexpr = gl.DotOperandLayout(1, SUMS, 32 // BITS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, SUMS)
    seq = gl.program_id(0)
    split = gl.program_id(1)
    seq_len = gl.load(seq_lens_ptr + seq)
    table_row = page_table_ptr + seq.to(gl.int64) * table_stride
    nth = gl.arange(0, _WINDOW, in_every_warp(_WINDOW, WARPS))
    pages = _pages(table_row, split, splits, nth, max_blocks)
    pages_after = _pages(table_row, split, splits, _WINDOW + nth, max_blocks)
    ring = gl.allocate_shared_memory(tiles.dtype, [SLOTS, TILE, DIM], tiles.layout)
    arrivals = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    if FEW_WARPS:
        nought = gl.allocate_shared_memory(gl.float32, [COLUMNS], gl.SwizzledSharedLayout(1, 1, 1, [0]))
        nought.store(gl.zeros([COLUMNS], gl.float32, COLUMN))
    for slot in gl.static_range(SLOTS):
        mbarrier.init(arrivals.index(slot), count=1)
    count = _share((gl.maximum(seq_len, 0) + TOKENS - 1) // TOKENS, split, splits)
    settled = _share(gl.maximum(seq_len - query_len, 0) // TOKENS, split, splits)
    _ask(tiles, _page(pages, nth, 0) * page_lines, arrivals.index(0), ring.index(0), settled > 0, BYTES)
    q_column = gl.arange(0, COLUMNS, gl.SliceLayout(0, Q_SIDE))  # [COLUMNS], a head and a query row each
    q_row = seq * query_len + q_column % QUERY_TILE
    q_real = (q_column // QUERY_TILE < HEADS) & (q_column % QUERY_TILE < query_len)
    q_at = q_ptr + q_row.to(gl.int64) * q_row_stride + q_column // QUERY_TILE * q_head_stride
    for sector in gl.static_range(DIM * BITS // _SECTOR_BITS):  # by one program of each sequence, for all
        _hint(q_at + sector * (_SECTOR_BITS // BITS), q_real & (split == 0))
    # The same columns as the products' sums have them.
    column = gl.arange(0, COLUMNS, COLUMN)
    token = gl.arange(0, TILE, gl.SliceLayout(1, SUMS))
    row = column % QUERY_TILE
    real = (column // QUERY_TILE < HEADS) & (row < query_len)
    visible = gl.maximum(seq_len - query_len + row + 1, 0)  # [COLUMNS], keys that the column sees
    visible_blocks = (visible + TOKENS - 1) // TOKENS
    flat_column = (seq * query_len + row).to(gl.int64) * HEADS + column // QUERY_TILE
    keys_at = keys_ptr + flat_column * keys_stride
    leaders_at = leaders_ptr + flat_column * leaders_stride
    leader = gl.zeros([COLUMNS], gl.int64, COLUMN)
    for slot in gl.static_range(1, SLOTS):  # one behind the other: see above
        mbarrier.wait(arrivals.index(slot - 1), 0, pred=(slot - 1) // TILES < settled)
        line = _page(pages, nth, slot // TILES) * page_lines + slot % TILES * TILE
        _ask(tiles, line, arrivals.index(slot), ring.index(slot), slot // TILES < settled, BYTES)
    tl.extra.cuda.gdc_wait()
    if BEHIND == 0:
        tl.extra.cuda.gdc_launch_dependents()
    if count > 0:
        dim = gl.arange(0, DIM, gl.SliceLayout(1, Q_SIDE))
        q = gl.load(q_at[None, :] + dim[:, None], mask=q_real[None, :] & (dim[:, None] < DIM), other=0.0).to(HALF)
        for slot in gl.static_range(SLOTS):
            line = _page(pages, nth, slot // TILES) * page_lines + slot % TILES * TILE
            late = (slot // TILES >= settled) & (slot // TILES < count)  # tiles of the step's own tokens
            _ask(tiles, line, arrivals.index(slot), ring.index(slot), late, BYTES)
        page = _page(pages, nth, SLOTS // TILES)
        at = 0
        phase = 0
        for turn in range(count):
            block = split + turn * splits
            if BEHIND > 0:
                if turn == gl.maximum(count - BEHIND, 0):
                    tl.extra.cuda.gdc_launch_dependents()
            best = gl.full([COLUMNS], HIDDEN, gl.int32, COLUMN)
            for tile in gl.static_range(TILES):
                if (tile + SLOTS) % TILES == 0:  # the one to be asked for is the first of its block
                    ahead = turn + (tile + SLOTS) // TILES
                    if ahead % _WINDOW == 0:
                        pages = pages_after
                        pages_after = _pages(table_row, split, splits, ahead + _WINDOW + nth, max_blocks)
                    page = _page(pages, nth, ahead % _WINDOW)
                mbarrier.wait(arrivals.index(at), phase)
                k = ring.index(at).load(K_SIDE)
                # All warps have read the tile; its place is for the one that comes SLOTS later.
                tl.debug_barrier()
                line = page * page_lines + (tile + SLOTS) % TILES * TILE
                wanted = turn + (tile + SLOTS) // TILES < count
                _ask(tiles, line, arrivals.index(at), ring.index(at), wanted, BYTES)
                zeros = gl.zeros([TILE, COLUMNS], gl.float32, SUMS)
                if FEW_WARPS:
                    # Read behind the request, or the assembler puts the products in front of it.
                    zeros += nought.load(COLUMN)[None, :]
                ordered = _ordered(mma_v2(k.to(HALF), q, zeros))
                if FEW_WARPS:  # whom a branch costs less than masks
                    if turn >= settled:
                        ordered = _visible(ordered, block * TOKENS + tile * TILE + token, visible)
                else:
                    ordered = _visible(ordered, block * TOKENS + token, visible)
                best = gl.maximum(best, gl.max(ordered, axis=0))
                at += 1
                if at == SLOTS:
                    at = 0
                    phase ^= 1
            key = _block_key(best, block, visible_blocks, init_blocks, local_blocks)
            is_visible = real & (block < visible_blocks)
            if GROUP == 1:
                gl.store(keys_at + block, key, mask=is_visible)
            else:
                group = turn // GROUP * splits + split
                member = turn % GROUP
                gl.store(keys_at + group * GROUP + member, key, mask=is_visible)
                seen = gl.where(block < visible_blocks, key, HIDDEN)
                wide = (seen.to(gl.int64) << 32) | (0x7FFFFFFF - block).to(gl.int64)
                leader = gl.where(member == 0, wide, gl.maximum(leader, wide))
                if (member == GROUP - 1) | (turn == count - 1):
                    gl.store(leaders_at + group, leader, mask=real)


@gluon.jit
def _share(blocks, split, splits):
    """How many of the first ``blocks`` are this program's."""
    return gl.maximum((blocks - split + splits - 1) // splits, 0)


@gluon.jit
def _pages(table_row, split, splits, nth, max_blocks):
    """Physical pages of the program's blocks of these numbers."""
    block = split + nth * splits
    return gl.load(table_row + block, mask=block < max_blocks, other=0)


@gluon.jit
def _page(pages, nth, place):
    """The one of these pages that has this place among them."""
    return gl.sum(gl.where(nth == place, pages, 0), axis=0)


@gluon.jit
def _ask(tiles, line, arrival, place, wanted, BYTES: gl.constexpr):
    mbarrier.expect(arrival, BYTES, pred=wanted)
    tma.async_copy_global_to_shared(tiles, [line, 0], arrival, place, pred=wanted)


@gluon.jit
def _hint(at, wanted):
    """Have the second-level cache fetch these lines; what stands in them is read later."""
    gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p prefetch.global.L2 [$1]; mov.u32 $0, 0; }",
        "=r,l,r",
        [at.to(gl.int64), wanted.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=1,
    )


@gluon.jit
def _ordered(dots):
    """Integers that order as the scores do; NaN is below all numbers, as a key will have it."""
    bits = dots.to(gl.int32, bitcast=True)
    ordered = gl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    return gl.where(dots != dots, INIT, ordered)


@gluon.jit
def _visible(ordered, position, visible):
    return gl.where(position[:, None] < visible[None, :], ordered, HIDDEN)


@gluon.jit
def _block_key(best, block, visible_blocks, init_blocks, local_blocks):
    """As ``index_scan``'s: the key of one block for each column, int32 [COLUMNS], by the best of its tokens."""
    key = gl.where(best == INIT, NAN, best)
    key = gl.where(block >= visible_blocks - local_blocks, LOCAL, key)
    return gl.where(block < init_blocks, INIT, key)
