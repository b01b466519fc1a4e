"""The scan of all index keys in decode: for each block, row and head one integer, which orders as the score does.

Every program has some blocks of one sequence; all query rows and index heads of the sequence share each tile of keys.

A program spends its first microseconds on its way to its first tile. Where what it reads is settled (``DecodeBatch``)
and launches may overlap, it goes that way while the kernel in front is at work: lengths, page numbers and as many tiles
as there is room for are on their way or there when its turn comes, so that the memory does not rest between launches.
The blocks of the step's own tokens and the queries are read in its turn. Where nothing is settled, it can ask the
second-level cache for its first tile. That is a hint: lengths and pages that are read for it before the program's turn,
past the first-level cache, decide nothing else, and are read again.

Of tables of many blocks a program also notes the best of every few that it takes one after another, a *group*, so that
the selection need not read all keys. Group g of all is the one that program g % splits takes in its turn g // splits.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.fp8_bits import fp8_code, half_of_bits
from pdkv_kernels.index_keys import HIDDEN, INIT, LOCAL, NAN, wide_keys
from pdkv_kernels.index_ring import RingPlan, scan_by_ring
from pdkv_kernels.launch import chained, launch_options, stages_that_fit
from pdkv_kernels.paged import BLOCK

MOST_WITHOUT_GROUPS = 1024
"""Blocks of a table whose keys a selection reads all at once."""
_LONGEST_GROUP = 16


@dataclass(frozen=True)
class ScanPlan:
    """How the scan is cut up, by shapes alone."""

    splits: int  # programs that share one sequence
    num_warps: int
    num_stages: int  # of its loop: one more than the tiles that are on their way
    ahead: int = 32  # pages that a program looks up at once
    in_advance: bool = True  # where it is settled what they are, the first tiles are asked for before its turn
    early_tiles: int = 1  # tiles that the second-level cache is asked for before its turn otherwise
    ring: RingPlan | None = None  # by ``index_ring``, which then has no use for the others but ``splits``


def group_length(max_blocks: int, splits: int) -> int:
    """Blocks of a group, a power of two; 1: no groups. All groups have room for at most twice as many blocks as are."""
    if max_blocks <= MOST_WITHOUT_GROUPS:
        return 1
    return min(_LONGEST_GROUP, 1 << (-(-max_blocks // splits) - 1).bit_length())


def group_count(max_blocks: int, splits: int) -> int:
    """Groups of so many blocks; they are the first of those of more."""
    rounds, left = divmod(max_blocks, splits * group_length(max_blocks, splits))
    return rounds * splits + min(left, splits)


def scan_blocks(
    keys: Tensor,
    leaders: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    batch: DecodeBatch,
    forced: tuple[int, int],
    plan: ScanPlan,
) -> None:
    """Write the key of every visible block to keys: int32 [num_rows * heads or more, max_blocks or more].

    With groups, the keys of each lie side by side, [.., group_count, group_length], and leaders, int64 [num_rows *
    heads or more, group_count or more], gets the best of each as ``wide_keys`` are ordered; else it is left alone. The
    others are as ``index_topk_decode_into`` takes them; forced: blocks at the beginning, and at the end of what a row
    sees, that are chosen whatever they score.
    """
    _, heads, dim = index_q.shape
    key_code, key_data = fp8_code(index_k, beside=index_q.dtype)
    query_code, query_data = fp8_code(index_q, beside=index_k.dtype)
    early = chained()
    in_advance = early and batch.settled and plan.in_advance
    group = group_length(batch.page_table.shape[1], plan.splits)
    if plan.ring:
        scan_by_ring((keys, leaders), index_q, index_k, batch, forced, (plan.splits, group), plan.ring)
        return
    columns = triton.next_power_of_2(heads) * triton.next_power_of_2(batch.query_len)
    tiles = key_data
    in_one_piece = early and _in_one_piece(key_data)
    if in_one_piece:
        tiles = TensorDescriptor(key_data, list(key_data.shape), list(key_data.stride()), [1, BLOCK, dim])
    stages = stages_that_fit(plan.num_stages, BLOCK * dim * index_k.element_size(), columns * dim * 4)
    _scan_kernel[(batch.num_seqs, plan.splits)](
        query_data,
        key_data,
        tiles,
        keys,
        leaders,
        batch.page_table,
        batch.seq_lens,
        plan.splits,
        batch.query_len,
        *forced,
        query_data.stride(0),
        query_data.stride(1),
        key_data.stride(0),
        key_data.stride(1),
        keys.stride(0),
        leaders.stride(0),
        batch.page_table.stride(0),
        batch.page_table.shape[1],
        key_data.shape[0],
        HEADS=heads,
        HEAD_TILE=triton.next_power_of_2(heads),
        QUERY_TILE=triton.next_power_of_2(batch.query_len),
        DIM=dim,
        TOKENS=BLOCK,
        KEY_CODE=key_code,
        QUERY_CODE=query_code,
        AHEAD=plan.ahead,
        REQUESTS=in_one_piece,
        EARLY_TILES=plan.early_tiles if in_one_piece and not in_advance else 0,
        FIRST_TILES=stages if in_advance else 0,
        GROUP=group,
        EARLY=early,
        **launch_options(early, plan.num_warps, stages),
    )


def _in_one_piece(keys: Tensor) -> bool:
    """Whether each tile is one run of bytes from a multiple of 16 on, as a request for all of it must be."""
    page_bytes = keys.stride(0) * keys.element_size()
    return keys.stride(1) == keys.shape[2] and keys.data_ptr() % 16 == page_bytes % 16 == 0


@triton.jit(do_not_specialize=["splits", "query_len", "init_blocks", "local_blocks", "max_blocks", "num_pages"])
def _scan_kernel(
    q_ptr,  # [num_rows, heads, DIM]
    k_ptr,  # [num_pages, TOKENS, DIM]
    tiles,  # the same, or a descriptor of it
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
    k_page_stride,
    k_token_stride,
    keys_stride,
    leaders_stride,
    table_stride,
    max_blocks,
    num_pages,
    HEADS: tl.constexpr,
    HEAD_TILE: tl.constexpr,
    QUERY_TILE: tl.constexpr,
    DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    KEY_CODE: tl.constexpr,
    QUERY_CODE: tl.constexpr,
    AHEAD: tl.constexpr,
    REQUESTS: tl.constexpr,  # each tile comes by one request, not by one for each 16 bytes
    EARLY_TILES: tl.constexpr,
    FIRST_TILES: tl.constexpr,  # no fewer than the loop asks for before its first turn is over; 0: nothing is settled
    GROUP: tl.constexpr,  # 1: no groups
    EARLY: tl.constexpr,
):
    seq = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    dims = tl.arange(0, DIM)
    column = tl.arange(0, HEAD_TILE * QUERY_TILE)  # [columns], a head and a query row each
    head = column // QUERY_TILE
    row = column % QUERY_TILE
    real = (head < HEADS) & (row < query_len)
    table_row = page_table_ptr + seq.to(tl.int64) * table_stride
    flat_row = (seq * query_len + row).to(tl.int64)
    q_at = q_ptr + flat_row[:, None] * q_row_stride + head[:, None] * q_head_stride + dims[None, :]
    if EARLY:
        if FIRST_TILES == 0:
            for early in tl.static_range(EARLY_TILES):
                hinted = _page_before_the_wait(
                    table_row, seq_lens_ptr + seq, split + early * splits, max_blocks, num_pages, TOKENS
                )
                _ask_for_tile(k_ptr + hinted.to(tl.int64) * k_page_stride, hinted >= 0, TOKENS, DIM)
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
    # What needs no length is asked for together with it.
    if FIRST_TILES == 0:
        q_bits = tl.load(q_at, mask=real[:, None], other=0.0)
    nth = tl.arange(0, AHEAD)
    pages = tl.load(table_row + split + nth * splits, mask=split + nth * splits < max_blocks, other=0)
    seq_len = tl.load(seq_lens_ptr + seq)
    num_blocks = (seq_len + TOKENS - 1) // TOKENS
    visible = tl.maximum(seq_len - query_len + row + 1, 0)  # [columns], keys that the column sees
    visible_blocks = (visible + TOKENS - 1) // TOKENS
    count = (num_blocks - split + splits - 1) // splits
    if FIRST_TILES > 0:
        settled_blocks = tl.maximum(seq_len - query_len, 0) // TOKENS
        settled = (settled_blocks - split + splits - 1) // splits
        # Every program must wait. Who would ask for the step's own tokens too soon waits before it asks for any.
        if (count <= 0) | ((settled < count) & (settled <= FIRST_TILES)):
            tl.extra.cuda.gdc_wait()
            tl.extra.cuda.gdc_launch_dependents()
        q = half_of_bits(tl.zeros((DIM, HEAD_TILE * QUERY_TILE), q_ptr.dtype.element_ty), QUERY_CODE)
    else:
        q = tl.trans(half_of_bits(q_bits, QUERY_CODE))  # [DIM, columns]
    keys_at = keys_ptr + (flat_row * HEADS + head) * keys_stride
    leaders_at = leaders_ptr + (flat_row * HEADS + head) * leaders_stride
    leader = tl.zeros((HEAD_TILE * QUERY_TILE,), tl.int64)
    k_offsets = token[:, None] * k_token_stride + dims[None, :]
    for begin in tl.range(0, count, AHEAD, num_stages=1):
        # Which pages, before the loop: inside it, each tile would wait for its page's number.
        if begin != 0:
            blocks = split + (begin + nth) * splits
            pages = tl.load(table_row + blocks, mask=blocks < max_blocks, other=0)
        for step in tl.range(0, tl.minimum(AHEAD, count - begin)):
            block = split + (begin + step) * splits
            page = tl.sum(tl.where(nth == step, pages, 0), axis=0)
            if REQUESTS:
                k = half_of_bits(tl.reshape(tiles.load([page, 0, 0]), (TOKENS, DIM)), KEY_CODE)
            else:
                k = half_of_bits(tl.load(k_ptr + page.to(tl.int64) * k_page_stride + k_offsets), KEY_CODE)
            if FIRST_TILES > 0:
                # Inside the loop, since its pipeline has asked for the first tiles in front of it.
                if begin + step == 0:
                    tl.extra.cuda.gdc_wait()
                    tl.extra.cuda.gdc_launch_dependents()
                    q = tl.trans(half_of_bits(tl.load(q_at, mask=real[:, None], other=0.0), QUERY_CODE))
            key = _block_keys(k, q, block, visible, visible_blocks, init_blocks, local_blocks, TOKENS)
            is_visible = real & (block < visible_blocks)
            if GROUP == 1:
                tl.store(keys_at + block, key, mask=is_visible)
            else:
                turn = begin + step
                group = turn // GROUP * splits + split
                member = turn % GROUP
                tl.store(keys_at + group * GROUP + member, key, mask=is_visible)
                # What the column does not see is below all that it does, and nobody asks for groups that begin with it.
                wide = wide_keys(tl.where(block < visible_blocks, key, HIDDEN), block)
                leader = tl.where(member == 0, wide, tl.maximum(leader, wide))
                if (member == GROUP - 1) | (turn == count - 1):
                    tl.store(leaders_at + group, leader, mask=real)


@triton.jit
def _page_before_the_wait(table_row, seq_len_ptr, block, max_blocks, num_pages, TOKENS: tl.constexpr):
    """The block's page, or -1: perhaps an old one, but a page that there is. It must decide nothing but a hint."""
    num_blocks = (tl.load(seq_len_ptr, cache_modifier=".cg") + TOKENS - 1) // TOKENS
    live = block < tl.minimum(num_blocks, max_blocks)
    page = tl.load(table_row + block, mask=live, other=-1, cache_modifier=".cg")
    return tl.where(page < num_pages, page, -1)


@triton.jit
def _ask_for_tile(at, wanted, TOKENS: tl.constexpr, DIM: tl.constexpr):
    """Have the second-level cache fetch TOKENS * DIM elements in one piece from this address, if wanted.

    The instruction takes one address a warp, and lanes that differ would be served in turns, each a few dozen cycles:
    so the 32 lanes of a warp ask for the same 32 tokens, which is done once.
    """
    BYTES: tl.constexpr = 32 * DIM * at.dtype.element_ty.primitive_bitwidth // 8
    part = tl.arange(0, TOKENS) // 32
    tl.inline_asm_elementwise(
        "{ .reg .pred p; setp.ne.s32 p, $2, 0; @p cp.async.bulk.prefetch.L2.global [$1], $3; mov.u32 $0, 0; }",
        "=r,l,r,r",
        [(at + part * (32 * DIM)).to(tl.int64), wanted.to(tl.int32), BYTES],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _block_keys(k, q, block, visible, visible_blocks, init_blocks, local_blocks, TOKENS: tl.constexpr):
    """The key of one block for each column: int32 [columns]."""
    dots = tl.dot(k, q.to(k.dtype), input_precision="ieee")  # float32 [TOKENS, columns]
    bits = dots.to(tl.int32, bitcast=True)
    ordered = tl.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    # NaN must win inside its block, so that it is noticed, and lose among blocks.
    ordered = tl.where(dots != dots, INIT, ordered)
    ordered = tl.where((block * TOKENS + tl.arange(0, TOKENS))[:, None] < visible[None, :], ordered, HIDDEN)
    key = tl.max(ordered, axis=0)
    key = tl.where(key == INIT, NAN, key)
    key = tl.where(block >= visible_blocks - local_blocks, LOCAL, key)
    return tl.where(block < init_blocks, INIT, key)
