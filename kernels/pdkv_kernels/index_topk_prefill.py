"""The lightning indexer for many query rows: block scores by tiles of rows and heads, then the best few of each.

Scores go through a bounded buffer, a slice of rows at a time, blocks outermost: a tile writes one run of columns for
each block, and selection reads runs too.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.fp8_bits import PLAIN, fp8_code, half_of_bits
from pdkv_kernels.hardware import hardware
from pdkv_kernels.key_network import best_of_both, best_of_parts, side_by_side, sorted_keys
from pdkv_kernels.launch import chained, launch_options
from pdkv_kernels.page_number import next_page
from pdkv_kernels.paged import BLOCK, RaggedQueries
from pdkv_kernels.ragged_tiles import most_tiles, tile_sequence

_TRITON_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
_SCORE_BYTES = 160 << 20
"""Most that scores take at one time, whatever the chunk and the context."""
_ROW_MULTIPLE = 64
_LANES = 32
"""Parts of columns that one warp selects from; on wider warps the rest of it repeats them."""


@dataclass(frozen=True)
class ScoreTuning:
    """What was measured best; scores do not depend on it, selection is exact whatever it is."""

    tile_rows: int = 128
    """Query rows times heads of a tile."""
    warps: int = 4
    stages: int | None = None
    """Tiles of keys on their way, and one; as many as leave room for two programs on a multiprocessor."""
    programs: int = 264
    """So many run at a time; contexts are split where tiles alone do not fill them."""
    select_splits: int | None = None
    """Into how many parts the blocks of a row and head are cut that threads go through at the same time."""


DEFAULT_TUNING = ScoreTuning()


def index_topk_prefill(
    index_q: Tensor,
    index_k: Tensor,
    queries: RaggedQueries,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    out: Tensor | None = None,
    tuning: ScoreTuning = DEFAULT_TUNING,
) -> Tensor:
    """``index_topk_ref`` for many rows a sequence: int32 [num_rows, heads, topk]. Rows behind the last are all -1.

    fp8 keys with fp8 queries of the same format are multiplied natively; otherwise keys are widened exactly. Sums are
    float32. Blocks come in the total order of ``select_blocks_ref``.
    """
    num_rows, heads, dim = index_q.shape
    assert index_q.stride(2) == 1
    assert index_k.stride(2) == 1
    if out is None:
        out = torch.empty(num_rows, heads, topk, dtype=torch.int32, device=index_q.device)
    if num_rows == 0:
        return out
    max_blocks = queries.page_table.shape[1]
    slice_rows = _SCORE_BYTES // (4 * heads * max_blocks) // _ROW_MULTIPLE * _ROW_MULTIPLE
    slice_rows = min(max(slice_rows, _ROW_MULTIPLE), triton.cdiv(num_rows, _ROW_MULTIPLE) * _ROW_MULTIPLE)
    scores = torch.empty(max_blocks, slice_rows * heads, dtype=torch.float32, device=index_q.device)
    for first in range(0, num_rows, slice_rows):
        end = min(first + slice_rows, num_rows)
        score_blocks(index_q, index_k, queries, scores, (first, end), tuning)
        select_blocks(scores, queries, (first, end), (topk, init_blocks, local_blocks), out, tuning)
    return out


def score_blocks(
    index_q: Tensor, index_k: Tensor, queries: RaggedQueries, scores: Tensor, rows: tuple[int, int], tuning: ScoreTuning
) -> None:
    """Best dot product of each of some rows and its heads with each visible block, NaN if one is NaN.

    scores: float32 [max_blocks, (rows[1] - rows[0]) * heads or more columns]; what a row cannot see is left as it was.
    """
    _, heads, dim = index_q.shape
    num_seqs = queries.context_lens.numel()
    heads_padded = triton.next_power_of_2(heads)
    tile_queries = max(1, tuning.tile_rows // heads_padded, 16 // heads_padded)
    tiles = most_tiles(rows[1] - rows[0], num_seqs, tile_queries)
    splits = min(_fewest_splits(tiles, tuning.programs), max(1, scores.shape[0] // 4))
    code, k = fp8_code(index_k, beside=index_q.dtype)
    # Equal native formats meet as they are; where either side is widened, so is the other.
    q_code, q = (PLAIN, index_q) if code == PLAIN else fp8_code(index_q)
    assert q_code in (PLAIN, code), "fp8 queries need keys of the same format"
    meets = _TRITON_TYPES.get(index_q.dtype, tl.float16)
    stages = tuning.stages or (3 if index_q.dtype.itemsize == 1 else 2)
    early = chained()
    _score_blocks[(tiles, splits)](
        q, k, scores, queries.query_starts, queries.context_lens, queries.page_table,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), queries.page_table.stride(0), scores.stride(0),
        num_seqs, *rows,
        CODE=code, Q_CODE=q_code, TYPE=meets, STAGES=stages,
        HEADS=heads, HEADS_P=heads_padded, DIM=dim, BLOCK=BLOCK, QUERIES=tile_queries,
        PORTABLE=triton.knobs.runtime.interpret, ASIDE=hardware().nvidia, EARLY=early,
        **launch_options(early, tuning.warps, stages),
    )  # fmt: skip


def _fewest_splits(tiles: int, programs: int) -> int:
    """Into how many to cut each tile's blocks so that rounds of ``programs`` at a time are nearly full."""
    most = max(8, programs // tiles)

    def filled(splits: int) -> float:
        return tiles * splits / (-(-tiles * splits // programs) * programs)

    return next((n for n in range(1, most + 1) if filled(n) >= 0.95), max(range(1, most + 1), key=filled))


def select_blocks(
    scores: Tensor,
    queries: RaggedQueries,
    rows: tuple[int, int],
    choice: tuple[int, int, int],
    out: Tensor,
    tuning: ScoreTuning,
) -> None:
    """The best of each column of ``scores``, in the order of ``select_blocks_ref``, into these rows of ``out``.

    choice: (topk, init_blocks, local_blocks).
    """
    heads = out.shape[1]
    topk, init_blocks, local_blocks = choice
    columns = (rows[1] - rows[0]) * heads
    # With few columns there would be too few warps to hide what each of them waits for.
    splits = tuning.select_splits or max(1, min(8, triton.next_power_of_2(1 + 16383 // columns)))
    early = chained()
    _select_blocks[(triton.cdiv(columns, _LANES // splits),)](
        scores, out, queries.query_starts, queries.context_lens, scores.stride(0), out.stride(0), out.stride(1),
        queries.context_lens.numel(), *rows, init_blocks, local_blocks,
        HEADS=heads, TOPK=topk, TOPK_P=triton.next_power_of_2(topk), BLOCK=BLOCK,
        COLUMNS=_LANES // splits, SPLITS=splits, WIDE=hardware().wide_float64,
        EARLY=early, **launch_options(early, 1, 1),
    )  # fmt: skip


@triton.jit
def _nan_max(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _best_of_block(dots, PORTABLE: tl.constexpr):
    """Largest of each row, NaN if one is NaN."""
    if PORTABLE:  # the interpreter takes custom reductions element by element
        best = tl.max(tl.where(dots == dots, dots, -float("inf")), axis=1)
        return tl.where(tl.max((dots != dots).to(tl.int32), axis=1) > 0, float("nan"), best)
    else:
        return tl.reduce(dots, 1, _nan_max)


@triton.jit(do_not_specialize=["num_seqs", "first_row", "end_row"])
def _score_blocks(
    q, k, scores, query_starts, context_lens, page_table,
    q_row, q_head, k_page, k_token, table_row, scores_block, num_seqs, first_row, end_row,
    CODE: tl.constexpr, Q_CODE: tl.constexpr, TYPE: tl.constexpr, HEADS: tl.constexpr, HEADS_P: tl.constexpr,
    DIM: tl.constexpr, BLOCK: tl.constexpr, QUERIES: tl.constexpr, STAGES: tl.constexpr, PORTABLE: tl.constexpr,
    ASIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Tile of consecutive rows of one sequence, all heads, against its split of the blocks that the tile sees."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    tile = tl.program_id(0)
    seq, before = tile_sequence(tile, query_starts, num_seqs, first_row, end_row, QUERIES)
    if seq >= 0:
        start = tl.load(query_starts + seq)
        row = tl.maximum(start, first_row) + (tile - before) * QUERIES
        end = tl.minimum(tl.load(query_starts + seq + 1), end_row)
        position = row - start + tl.load(context_lens + seq)  # of the tile's first row
        last = position + tl.minimum(QUERIES, end - row) - 1
        num_blocks = last // BLOCK + 1
        share = (num_blocks + tl.num_programs(1) - 1) // tl.num_programs(1)
        first_block = tl.program_id(1) * share
        end_block = tl.minimum(first_block + share, num_blocks)
        full_end = tl.minimum(tl.maximum((position + 1) // BLOCK, first_block), end_block)

        m = tl.arange(0, QUERIES * HEADS_P)
        n = tl.arange(0, BLOCK)
        d = tl.arange(0, DIM)
        nth, head = m // HEADS_P, m % HEADS_P
        asks = (row + nth < end) & (head < HEADS)
        q_at = q + (row + nth).to(tl.int64) * q_row + head.to(tl.int64) * q_head
        q_tile = tl.load(q_at[:, None] + d[None, :], mask=asks[:, None], other=0.0)
        q_tile = half_of_bits(q_tile, Q_CODE)
        to = scores + first_block.to(tl.int64) * scores_block + (row - first_row + nth) * HEADS + head
        k_tile_at = k + n[:, None] * k_token + d[None, :]
        table = page_table + seq.to(tl.int64) * table_row
        page = tl.load(table + first_block, mask=first_block < end_block, other=0).to(tl.int64)
        for block in tl.range(first_block, full_end, num_stages=STAGES):
            keys = tl.load(k_tile_at + page * k_page)
            keys = keys if CODE == 0 else half_of_bits(keys, CODE).to(TYPE)
            # The next page's number is fetched an iteration ahead of the keys that wait for it.
            page = next_page(table + tl.minimum(block + 1, end_block - 1), ASIDE)
            dots = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
            tl.store(to, _best_of_block(dots, PORTABLE), mask=asks)
            to += scores_block
        for block in range(full_end, end_block):
            page = tl.load(table + block).to(tl.int64)
            keys = tl.load(k_tile_at + page * k_page)
            keys = keys if CODE == 0 else half_of_bits(keys, CODE).to(TYPE)
            dots = tl.dot(q_tile, tl.trans(keys), input_precision="ieee")
            seen = block * BLOCK + n[None, :] <= (position + nth)[:, None]
            best = _best_of_block(tl.where(seen, dots, -float("inf")), PORTABLE)
            tl.store(to, best, mask=asks)
            to += scores_block


@triton.jit
def _visible_blocks(row, query_starts, context_lens, num_seqs, end_row, BLOCK: tl.constexpr):
    """How many blocks each row sees; 0 behind the last row. All that it hangs on is asked for at once."""
    position = tl.full(row.shape, -1, tl.int32)
    for first_seq in range(0, num_seqs, 16):
        some = first_seq + tl.arange(0, 16)
        there = some < num_seqs
        begins = tl.load(query_starts + some, mask=there, other=0)[None, :]
        ends = tl.load(query_starts + some + 1, mask=there, other=0)[None, :]
        before = tl.load(context_lens + some, mask=there, other=0)[None, :]
        mine = (row[:, None] >= begins) & (row[:, None] < ends)
        position = tl.maximum(position, tl.max(tl.where(mine, row[:, None] - begins + before, -1), axis=1))
    return tl.where((row < end_row) & (position >= 0), position // BLOCK + 1, 0)


@triton.jit
def _key_of(score, block, visible, init_blocks, local_blocks, WIDE: tl.constexpr):
    """A positive number that orders blocks as ``select_blocks_ref`` does: rank above, the block's complement below.

    WIDE: as float64, which orders positive numbers by their bits. One instruction compares two, beside those that move
    them; int64 takes two of the same kind as the moves.
    """
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # adding +0 turns -0 into +0
    rank = (bits ^ ((bits >> 31) | -0x80000000)).to(tl.uint32, bitcast=True)  # infinity is 0xFF800000
    rank = tl.where(score != score, 2, rank)
    # Above infinity, and below what would be NaN as float64.
    rank = tl.where(block >= visible - local_blocks, 0xFF800001, rank)
    rank = tl.where(block < init_blocks, 0xFF800002, rank)
    rank = tl.where(block < visible, rank, 1)  # below all that are seen
    key = (rank.to(tl.int64) << 31) | (0x7FFFFFFF - block).to(tl.int64)
    return key.to(tl.float64, bitcast=True) if WIDE else key


@triton.jit
def _next_scores(at, block, visible, scores_block, COUNT: tl.constexpr):
    scores: tl.tuple = ()
    for nth in tl.static_range(COUNT):
        scores = scores + (tl.load(at + nth * scores_block, mask=block + nth < visible, other=0.0),)
    return scores


@triton.jit(do_not_specialize=["num_seqs", "first_row", "end_row", "init_blocks", "local_blocks"])
def _select_blocks(
    scores, out, query_starts, context_lens, scores_block, out_row, out_head, num_seqs, first_row, end_row,
    init_blocks, local_blocks,
    HEADS: tl.constexpr, TOPK: tl.constexpr, TOPK_P: tl.constexpr, BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
    SPLITS: tl.constexpr, WIDE: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """The best of some columns, each thread a column or a part of one: runs of TOPK_P blocks are sorted and merged."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    row = first_row + column // HEADS
    visible = _visible_blocks(row, query_starts, context_lens, num_seqs, end_row, BLOCK)
    most = tl.max(visible, axis=0)
    to = out + row.to(tl.int64) * out_row + (column % HEADS) * out_head
    visible = visible[:, None]
    block = (tl.arange(0, SPLITS) * TOPK_P)[None, :] + tl.zeros([COLUMNS, SPLITS], tl.int32)
    at = scores + block.to(tl.int64) * scores_block + column[:, None]
    best: tl.tuple = ()
    for _ in tl.static_range(TOPK_P):
        best = best + (tl.zeros([COLUMNS, SPLITS], tl.float64 if WIDE else tl.int64),)
    coming = _next_scores(at, block, visible, scores_block, TOPK_P)
    for _ in range(0, most, TOPK_P * SPLITS):
        keys: tl.tuple = ()
        for nth in tl.static_range(TOPK_P):
            keys = keys + (_key_of(coming[nth], block + nth, visible, init_blocks, local_blocks, WIDE),)
        # Scores of the next run travel while this one is sorted.
        at += TOPK_P * SPLITS * scores_block
        block += TOPK_P * SPLITS
        coming = _next_scores(at, block, visible, scores_block, TOPK_P)
        best = best_of_both(best, sorted_keys(keys, TOPK_P), TOPK_P)
    best = best_of_parts(best, TOPK_P, SPLITS)
    chosen: tl.tuple = ()
    for nth in tl.static_range(TOPK_P):
        key = best[nth].to(tl.int64, bitcast=True)
        chosen = chosen + (tl.where(key >= 2 << 31, 0x7FFFFFFF - (key & 0x7FFFFFFF), -1).to(tl.int32),)
    place = tl.arange(0, TOPK_P)
    wanted = (row < end_row)[:, None] & (place[None, :] < TOPK)
    tl.store(to[:, None] + place[None, :], side_by_side(chosen, TOPK_P), mask=wanted)
