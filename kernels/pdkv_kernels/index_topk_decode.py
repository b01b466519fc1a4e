"""The lightning indexer in decode: a scan of all index keys at the memory's speed, then a small selection.

Two launches. The scan gives every program some blocks of one sequence; all query rows and index heads of the sequence
share each tile of keys, and what is kept of a block is one integer for each of them, which orders as the score does.
The selection has one program for each row and head. Among groups of blocks, the best 16 blocks lie in those 16 groups
whose best blocks are best: so it ranks groups first, and then the members of the winners.

Where launches may overlap, a scan's programs start while the selection in front of them is at work, and ask the
second-level cache for their first tiles. That is a hint: lengths and pages that they read before their turn, past the
first-level cache, decide nothing else, and are read again.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from pdkv_kernels.decode_batch import DecodeBatch, uniform_batch
from pdkv_kernels.fp8_bits import fp8_code, half_of_bits
from pdkv_kernels.launch import chained, launch_options, stages_that_fit
from pdkv_kernels.paged import BLOCK, RaggedQueries

_HIDDEN = tl.constexpr(-0x80000000)
_NAN = tl.constexpr(-0x7FFFFFFF)
_LOCAL = tl.constexpr(0x7FFFFFFE)
_INIT = tl.constexpr(0x7FFFFFFF)
"""Keys around those of real scores: -inf is -0x7F800000 and +inf is 0x7F800000."""

MOST_BLOCKS_AT_ONCE = 4096
"""Blocks that the selection ranks in one go; with more, it goes on from the best so far."""
_GROUP = 8
"""Blocks of a group. 16 and 32 were slower on an H200 wherever it mattered."""


@dataclass(frozen=True)
class SelectionRule:
    """How many blocks are chosen, and which are chosen whatever they score; those use up places."""

    topk: int
    init_blocks: int
    local_blocks: int


@dataclass(frozen=True)
class ScanPlan:
    """How the scan is cut up, by shapes alone."""

    splits: int  # programs that share one sequence
    num_warps: int
    num_stages: int
    ahead: int = 0  # pages that a program looks up at once; 0: each in its turn
    early_tiles: int = 0  # tiles that a program asks the second-level cache for before its turn
    requests: bool = False  # each tile comes by one request, not by one for each 16 bytes; where launches overlap
    registers: int = 0  # of a thread at most, where launches overlap; 0: as many as it likes


class IndexWorkspace:
    """Scores between the two launches, for batches of up to this many rows, heads and blocks.

    One workspace serves all layers, one after another on one stream. It never needs clearing.
    """

    def __init__(self, num_rows: int, num_heads: int, max_blocks: int, device: torch.device | str) -> None:
        self.keys = torch.empty(num_rows * num_heads, -(-max_blocks // 16) * 16, dtype=torch.int32, device=device)


def index_topk_decode(
    index_q: Tensor, index_k: Tensor, queries: RaggedQueries, topk: int, init_blocks: int, local_blocks: int
) -> Tensor:
    """``index_topk_ref`` for sequences that all have equally many query rows; allocates what it needs."""
    batch = uniform_batch(queries, index_q.shape[0])
    rule = SelectionRule(topk, init_blocks, local_blocks)
    out = torch.empty(*index_q.shape[:2], topk, dtype=torch.int32, device=index_q.device)
    workspace = IndexWorkspace(index_q.shape[0], index_q.shape[1], batch.page_table.shape[1], index_q.device)
    index_topk_decode_into(out, index_q, index_k, batch, rule, workspace)
    return out


def index_topk_decode_into(
    out: Tensor,
    index_q: Tensor,
    index_k: Tensor,
    batch: DecodeBatch,
    rule: SelectionRule,
    workspace: IndexWorkspace,
    plan: ScanPlan | None = None,
) -> None:
    """Write the blocks of every row and head to out: int32 [num_rows, heads, topk], any strides.

    index_q: [num_rows, heads, dim]; index_k: [num_pages, BLOCK, dim], any strides but 1 in the last dimension, in the
    same dtype or in another float. Equal fp8 dtypes are multiplied as they are. Neither allocates nor waits, and
    launches by shapes alone; a plan measured for M3 is used where none is given.
    """
    num_rows, heads, dim = index_q.shape
    assert num_rows == batch.num_seqs * batch.query_len, (index_q.shape, batch.num_seqs, batch.query_len)
    assert index_k.shape[1:] == (BLOCK, dim), index_k.shape
    assert index_k.stride(2) == 1, index_k.stride()
    assert index_q.stride(2) == 1, index_q.stride()
    assert batch.page_table.stride(1) == 1, batch.page_table.stride()
    assert out.shape == (num_rows, heads, rule.topk), out.shape
    keys = workspace.keys
    assert keys.shape[0] >= num_rows * heads, (keys.shape, index_q.shape)
    assert keys.shape[1] >= batch.page_table.shape[1], (keys.shape, batch.page_table.shape)
    assert keys.shape[1] % _GROUP == 0, keys.shape
    if num_rows == 0:
        return
    plan = plan or scan_plan(batch.num_seqs, index_k.element_size())
    key_code, key_data = fp8_code(index_k, beside=index_q.dtype)
    query_code, query_data = fp8_code(index_q, beside=index_k.dtype)
    early = chained()
    columns = triton.next_power_of_2(heads) * triton.next_power_of_2(batch.query_len)
    in_one_piece = early and _in_one_piece(key_data)
    tiles = key_data
    if requests := plan.requests and in_one_piece:
        tiles = TensorDescriptor(key_data, list(key_data.shape), list(key_data.stride()), [1, BLOCK, dim])
    stages = stages_that_fit(plan.num_stages, BLOCK * dim * index_k.element_size(), columns * dim * 4)
    _scan_kernel[(batch.num_seqs, plan.splits)](
        query_data,
        key_data,
        tiles,
        keys,
        batch.page_table,
        batch.seq_lens,
        plan.splits,
        batch.query_len,
        rule.init_blocks,
        rule.local_blocks,
        query_data.stride(0),
        query_data.stride(1),
        key_data.stride(0),
        key_data.stride(1),
        keys.stride(0),
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
        EARLY_TILES=plan.early_tiles if in_one_piece else 0,
        REQUESTS=requests,
        EARLY=early,
        **launch_options(early, plan.num_warps, stages),
        **({"maxnreg": plan.registers} if early and plan.registers else {}),
    )
    chunk = min(max(triton.next_power_of_2(keys.shape[1]), 64), MOST_BLOCKS_AT_ONCE)
    places = max(triton.next_power_of_2(rule.topk), 2)
    chunk = max(chunk, places)
    group = _GROUP if chunk >= max(256, places * _GROUP) else 1
    _select_kernel[(num_rows, heads)](
        keys,
        out,
        batch.seq_lens,
        batch.query_len,
        keys.stride(0),
        out.stride(0),
        out.stride(1),
        out.stride(2),
        HEADS=heads,
        TOKENS=BLOCK,
        TOPK=rule.topk,
        PLACES=places,
        GROUPS=chunk // group,
        GROUP=group,
        WHOLE=keys.shape[1] if chunk >= keys.shape[1] else 0,
        EARLY=early,
        **launch_options(early, 1 if chunk <= 64 else 4 if chunk <= 2048 else 8, 1),
    )


def _in_one_piece(keys: Tensor) -> bool:
    """Whether each tile is one run of bytes from a multiple of 16 on, as requests to the cache must be."""
    page_bytes = keys.stride(0) * keys.element_size()
    return keys.stride(1) == keys.shape[2] and keys.data_ptr() % 16 == page_bytes % 16 == 0


def scan_plan(num_seqs: int, key_bytes: int) -> ScanPlan:
    """For this many sequences and bytes of a key's element, measured on an H200.

    About four programs on each of its multiprocessors were best. One sequence is short work: its programs fill the
    multiprocessors exactly, each with three tiles in flight. Many short sequences fill them with eight, if registers
    let them; short tiles gain most by pages that are known beforehand, long ones by being asked for in one piece.
    """
    if num_seqs == 1:
        return ScanPlan(528 if key_bytes == 1 else 264, 4, 4, ahead=16, early_tiles=1)
    if num_seqs > 128 and key_bytes == 1:
        return ScanPlan(max(2, 1024 // num_seqs), 4, 3, early_tiles=1, registers=64)
    splits = 1 << (max(2, 512 // num_seqs).bit_length() - 1)
    if key_bytes == 1:
        return ScanPlan(splits, 4, 3, ahead=16, early_tiles=1)
    return ScanPlan(splits, 4, 3, requests=key_bytes == 2)


@triton.jit(do_not_specialize=["splits", "query_len", "init_blocks", "local_blocks", "max_blocks", "num_pages"])
def _scan_kernel(
    q_ptr,  # [num_rows, heads, DIM]
    k_ptr,  # [num_pages, TOKENS, DIM]
    tiles,  # the same, or a descriptor of it
    keys_ptr,  # int32 [num_rows * heads, max_blocks], out
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
    EARLY_TILES: tl.constexpr,
    REQUESTS: tl.constexpr,
    EARLY: tl.constexpr,
):
    seq = tl.program_id(0)
    split = tl.program_id(1)
    token = tl.arange(0, TOKENS)
    table_row = page_table_ptr + seq.to(tl.int64) * table_stride
    column = tl.arange(0, HEAD_TILE * QUERY_TILE)  # [columns], a head and a query row each
    head = column // QUERY_TILE
    row = column % QUERY_TILE
    real = (head < HEADS) & (row < query_len)
    if EARLY:
        for nth in tl.static_range(EARLY_TILES):
            early = _page_before_the_wait(
                table_row, seq_lens_ptr + seq, split + nth * splits, max_blocks, num_pages, TOKENS
            )
            _ask_for_tile(k_ptr + early.to(tl.int64) * k_page_stride, early >= 0, TOKENS, DIM)
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    # What needs no length is asked for together with it.
    dims = tl.arange(0, DIM)
    flat_row = (seq * query_len + row).to(tl.int64)
    q_at = q_ptr + flat_row[:, None] * q_row_stride + head[:, None] * q_head_stride + dims[None, :]
    q_bits = tl.load(q_at, mask=real[:, None], other=0.0)
    if AHEAD > 0:
        nth = tl.arange(0, AHEAD)
        pages = tl.load(table_row + split + nth * splits, mask=split + nth * splits < max_blocks, other=0)
    seq_len = tl.load(seq_lens_ptr + seq)
    num_blocks = (seq_len + TOKENS - 1) // TOKENS
    visible = tl.maximum(seq_len - query_len + row + 1, 0)  # [columns], keys that the column sees
    visible_blocks = (visible + TOKENS - 1) // TOKENS
    q = tl.trans(half_of_bits(q_bits, QUERY_CODE))  # [DIM, columns]
    keys_at = keys_ptr + (flat_row * HEADS + head) * keys_stride
    k_offsets = token[:, None] * k_token_stride + dims[None, :]
    if AHEAD == 0:
        for block in tl.range(split, num_blocks, splits):
            page = tl.load(table_row + block)
            if REQUESTS:
                k = half_of_bits(tl.reshape(tiles.load([page, 0, 0]), (TOKENS, DIM)), KEY_CODE)
            else:
                k = half_of_bits(tl.load(k_ptr + page.to(tl.int64) * k_page_stride + k_offsets), KEY_CODE)
            key = _block_keys(k, q, block, visible, visible_blocks, init_blocks, local_blocks, TOKENS)
            tl.store(keys_at + block, key, mask=real & (block < visible_blocks))
    else:
        for begin in tl.range(split, num_blocks, splits * AHEAD, num_stages=1):
            # Which pages, before the loop: inside it, each tile would wait for its page's number.
            if begin != split:
                pages = tl.load(table_row + begin + nth * splits, mask=begin + nth * splits < max_blocks, other=0)
            for step in tl.range(0, tl.minimum(AHEAD, (num_blocks - begin + splits - 1) // splits)):
                block = begin + step * splits
                page = tl.sum(tl.where(nth == step, pages, 0), axis=0).to(tl.int64)
                k = half_of_bits(tl.load(k_ptr + page * k_page_stride + k_offsets), KEY_CODE)  # [TOKENS, DIM]
                key = _block_keys(k, q, block, visible, visible_blocks, init_blocks, local_blocks, TOKENS)
                tl.store(keys_at + block, key, mask=real & (block < visible_blocks))


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
    ordered = tl.where(dots != dots, _INIT, ordered)
    ordered = tl.where((block * TOKENS + tl.arange(0, TOKENS))[:, None] < visible[None, :], ordered, _HIDDEN)
    key = tl.max(ordered, axis=0)
    key = tl.where(key == _INIT, _NAN, key)
    key = tl.where(block >= visible_blocks - local_blocks, _LOCAL, key)
    return tl.where(block < init_blocks, _INIT, key)


@triton.jit(do_not_specialize=["query_len"])
def _select_kernel(
    keys_ptr,  # int32 [num_rows * heads, max_blocks]
    out_ptr,  # int32 [num_rows, heads, TOPK]
    seq_lens_ptr,  # int32 [num_seqs]
    query_len,
    keys_stride,
    out_row_stride,
    out_head_stride,
    out_place_stride,
    HEADS: tl.constexpr,
    TOKENS: tl.constexpr,
    TOPK: tl.constexpr,
    PLACES: tl.constexpr,  # TOPK rounded up to a power of two
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE: tl.constexpr,  # columns of keys, if all are to be read at once, whatever the length; else 0
    EARLY: tl.constexpr,
):
    row = tl.program_id(0)
    head = tl.program_id(1)
    seq = row // query_len
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    keys_at = keys_ptr + (row.to(tl.int64) * HEADS + head) * keys_stride
    blocks = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    scores = tl.load(keys_at + blocks, mask=blocks < WHOLE, other=_HIDDEN)
    visible = tl.load(seq_lens_ptr + seq) - query_len + row % query_len + 1
    num_blocks = (tl.maximum(visible, 0) + TOKENS - 1) // TOKENS
    if WHOLE > 0:
        found = _wide_keys_of(tl.where(blocks < num_blocks, scores, _HIDDEN), blocks)
        best = tl.topk(tl.max(found, axis=1), PLACES)
        if GROUP > 1:
            best = _best_of_groups(keys_at, best, 0, num_blocks, PLACES, GROUP)
    else:
        best = tl.full((PLACES,), -0x8000000000000000, tl.int64)
        for begin in tl.range(0, num_blocks, GROUPS * GROUP):
            found = _best_of_chunk(keys_at, begin, num_blocks, PLACES, GROUPS, GROUP)
            if begin == 0:
                best = found
            else:
                best = tl.topk(tl.reshape(tl.join(best, found), (2 * PLACES,)), PLACES)
    # A key holds the ordered score above and the complement of the block below.
    block = 0x7FFFFFFF - (best & 0x7FFFFFFF).to(tl.int32)
    place = tl.arange(0, PLACES)
    block = tl.where(place < num_blocks, block, -1)
    out_at = out_ptr + row.to(tl.int64) * out_row_stride + head * out_head_stride
    tl.store(out_at + place * out_place_stride, block, mask=place < TOPK)


@triton.jit
def _best_of_chunk(keys_at, begin, num_blocks, PLACES: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr):
    """The best PLACES keys of GROUPS * GROUP blocks from ``begin`` on, best first: int64 [PLACES]."""
    group = tl.arange(0, GROUPS)
    if GROUP == 1:
        return tl.topk(_wide_keys(keys_at, begin + group, num_blocks, 1), PLACES)
    member = tl.arange(0, GROUP)
    blocks = begin + group[:, None] * GROUP + member[None, :]
    keys = _wide_keys(keys_at, blocks, num_blocks, GROUP)  # [GROUPS, GROUP]
    leaders = tl.topk(tl.max(keys, axis=1), PLACES)  # best block of each of the best groups
    return _best_of_groups(keys_at, leaders, begin, num_blocks, PLACES, GROUP)


@triton.jit
def _best_of_groups(keys_at, leaders, begin, num_blocks, PLACES: tl.constexpr, GROUP: tl.constexpr):
    """The best PLACES keys of the groups that these blocks lead: int64 [PLACES]."""
    winners = (0x7FFFFFFF - (leaders & 0x7FFFFFFF).to(tl.int32) - begin) // GROUP
    blocks = begin + winners[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    candidates = _wide_keys(keys_at, blocks, num_blocks, GROUP)  # [PLACES, GROUP]
    return tl.topk(tl.reshape(candidates, (PLACES * GROUP,)), PLACES)


@triton.jit
def _wide_keys(keys_at, blocks, num_blocks, GROUP: tl.constexpr):
    """Keys that all differ: the ordered score above, and below it the complement of the block, so that low ids win."""
    # Groups are loaded whole, four keys at once, which a mask that may cut them anywhere would forbid.
    scores = tl.load(keys_at + blocks, mask=blocks // GROUP * GROUP < num_blocks, other=_HIDDEN)
    return _wide_keys_of(tl.where(blocks < num_blocks, scores, _HIDDEN), blocks)


@triton.jit
def _wide_keys_of(scores, blocks):
    return (scores.to(tl.int64) << 32) | (0x7FFFFFFF - blocks).to(tl.int64)
