"""Selections turned round: which rows read a page, so that a page is loaded once for many of them.

Neighbouring rows often choose the same blocks. Rows are taken in tiles of a few neighbours. A page that enough rows of
a tile chose is *shared*: the tile attends to it as a whole. Every other choice is *loose*: loose readers of one page
are collected over a window of rows, wherever they stand.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.paged import BLOCK, RaggedQueries

_KEYS_PER_PROGRAM = 1024


@dataclass(frozen=True)
class TileShape:
    """How choices are grouped. All powers of two but ``share_from`` and ``window_rows``, a multiple of ``rows``."""

    rows: int
    """Neighbouring rows of a tile, at most 8."""
    share_from: int
    """So many rows of a tile must have chosen a page for the tile to share it."""
    readers_per_item: int
    """Most loose readers of a page that one work item takes."""
    window_rows: int
    """Rows over which loose readers are collected, and whose partial results exist at one time."""


@dataclass(frozen=True)
class PageReaders:
    """Who reads what, on the device.

    A *key* is a page of a kv head in a window: (window * heads + head) * pages + page. A *slot* numbers a loose choice:
    (row * heads + head) * topk + its place among the loose choices of row and head.
    """

    shared_count: Tensor  # int32 [num_tiles, heads]
    shared_page: Tensor  # int32 [num_tiles, heads, capacity]
    whole_count: Tensor  # int32 [num_tiles, heads], how many of these come first that all rows see to the end
    shared_limit: Tensor  # int64 [num_tiles, heads, capacity], a byte a row: keys that it sees; 0: did not choose it
    shared_reach: Tensor  # int32 [num_tiles, heads, capacity], the largest of these limits
    loose_count: Tensor  # int32 [num_rows, heads]
    key_count: Tensor  # int32 [num_windows * heads * num_pages], loose readers
    key_limit: Tensor  # int32, the same shape: keys that the farthest-seeing of them sees
    key_hidden: Tensor  # int32, the same shape: keys that one of them does not see; 0: all see it to the end
    key_start: Tensor  # int32, the same shape: where its readers begin
    reader_slot: Tensor  # int32 [num_choices], grouped by key
    reader_limit: Tensor  # int32 [num_choices]
    item_count: Tensor  # int32 [num_windows]
    item_key: Tensor  # int32 [num_windows, most items]
    item_first: Tensor  # int32 [num_windows, most items], the item's first reader, counted from its key's start


def page_readers(blocks: Tensor, queries: RaggedQueries, num_pages: int, shape: TileShape) -> PageReaders:
    """Group choices on the device, without a sync. blocks: int32 [num_rows, heads, topk], as attention takes them.

    The order of a key's readers and of items is not determined; what each reader computes does not depend on it.
    """
    num_rows, heads, topk = blocks.shape
    assert blocks.is_contiguous()
    device = blocks.device
    num_tiles = triton.cdiv(num_rows, shape.rows)
    num_windows = triton.cdiv(num_rows, shape.window_rows)
    capacity = shape.rows * topk // shape.share_from
    num_keys = num_windows * heads * num_pages
    window_choices = shape.window_rows * heads * topk
    most_items = window_choices // shape.readers_per_item + min(heads * num_pages, window_choices)

    def ints(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.int32, device=device)

    sizes = [num_keys, num_keys, num_keys, num_windows, num_windows]
    counters = torch.zeros(sum(sizes), dtype=torch.int32, device=device)
    key_count, key_limit, key_hidden, reader_count, item_count = counters.split(sizes)
    made = PageReaders(
        shared_count=ints(num_tiles, heads),
        shared_page=ints(num_tiles, heads, capacity),
        whole_count=ints(num_tiles, heads),
        shared_limit=torch.empty(num_tiles, heads, capacity, dtype=torch.int64, device=device),
        shared_reach=ints(num_tiles, heads, capacity),
        loose_count=ints(num_rows, heads),
        key_count=key_count,
        key_limit=key_limit,
        key_hidden=key_hidden,
        key_start=ints(num_keys),
        reader_slot=ints(num_windows * window_choices),
        reader_limit=ints(num_windows * window_choices),
        item_count=item_count,
        item_key=ints(num_windows, most_items),
        item_first=ints(num_windows, most_items),
    )
    choice_key, choice_rank, choice_slot, choice_limit = (ints(num_rows, heads, topk) for _ in range(4))
    _sort_choices[(num_tiles, heads)](
        blocks, queries.query_starts, queries.context_lens, queries.page_table,
        made.shared_count, made.whole_count, made.shared_page, made.shared_limit, made.shared_reach, made.loose_count,
        key_count, key_limit, key_hidden,
        choice_key, choice_rank, choice_slot, choice_limit,
        num_rows, queries.context_lens.numel(), queries.page_table.stride(0), num_pages, capacity,
        HEADS=heads, TOPK=topk, TOPK_P=triton.next_power_of_2(topk), ROWS=shape.rows, SHARE_FROM=shape.share_from,
        WINDOW_ROWS=shape.window_rows, BLOCK=BLOCK, num_warps=1,
    )  # fmt: skip
    keys_per_window = heads * num_pages
    _place_readers[(triton.cdiv(keys_per_window, _KEYS_PER_PROGRAM), num_windows)](
        key_count, made.key_start, reader_count, item_count, made.item_key, made.item_first,
        keys_per_window, window_choices, most_items,
        READERS_PER_ITEM=shape.readers_per_item, KEYS=_KEYS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    num_choices = num_rows * heads * topk
    _fill_readers[(triton.cdiv(num_choices, _KEYS_PER_PROGRAM),)](
        choice_key, choice_rank, choice_slot, choice_limit, made.key_start, made.reader_slot, made.reader_limit,
        num_choices, CHOICES=_KEYS_PER_PROGRAM, num_warps=4,
    )  # fmt: skip
    return made


@triton.jit
def _places(row, query_starts, context_lens, num_rows, num_seqs):
    """Sequence of each row, num_seqs where there is none, and the row's position in it."""
    seq = tl.zeros_like(row)  # sequences that end at or before the row
    for first_seq in range(0, num_seqs, 16):
        some = first_seq + tl.arange(0, 16)
        ends = tl.load(query_starts + some + 1, mask=some < num_seqs, other=2147483647)
        seq += tl.sum((row[:, None] >= ends[None, :]).to(tl.int32), axis=1)
    seq = tl.where(row < num_rows, seq, num_seqs)
    start = tl.load(query_starts + seq, mask=seq < num_seqs, other=0)
    return seq, row - start + tl.load(context_lens + seq, mask=seq < num_seqs, other=0)


@triton.jit
def _pages(block_at, wanted, seq, position, page_table, table_stride, num_seqs, BLOCK: tl.constexpr):
    """Page of each choice and how many of its keys the row sees; -1 and 0 where the choice counts for nothing."""
    wanted = wanted & (seq < num_seqs)
    block = tl.load(block_at, mask=wanted, other=-1)
    limit = tl.minimum(position - block * BLOCK + 1, BLOCK)
    wanted = wanted & (block >= 0) & (limit > 0)
    page = tl.load(page_table + seq.to(tl.int64) * table_stride + block, mask=wanted, other=-1)
    return page, tl.where(wanted & (page >= 0), limit, 0)


@triton.jit(do_not_specialize=["num_rows", "num_seqs", "num_pages"])
def _sort_choices(
    blocks, query_starts, context_lens, page_table,
    shared_count, whole_count, shared_page, shared_limit, shared_reach, loose_count, key_count, key_limit, key_hidden,
    choice_key, choice_rank, choice_slot, choice_limit,
    num_rows, num_seqs, table_stride, num_pages, capacity,
    HEADS: tl.constexpr, TOPK: tl.constexpr, TOPK_P: tl.constexpr, ROWS: tl.constexpr, SHARE_FROM: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One tile of rows and one kv head: shared pages with their readers' limits; loose choices with their rank."""
    tl.static_assert(ROWS <= 8)
    tile, head = tl.program_id(0), tl.program_id(1)
    CHOICES: tl.constexpr = ROWS * TOPK_P
    choice = tl.arange(0, CHOICES)
    row = tile * ROWS + choice // TOPK_P
    place = choice % TOPK_P
    flat = (row * HEADS + head) * TOPK + place
    seq, position = _places(row, query_starts, context_lens, num_rows, num_seqs)
    page, limit = _pages(
        blocks + flat, place < TOPK, seq, position, page_table, table_stride, num_seqs, BLOCK=BLOCK
    )  # fmt: skip
    exists = limit > 0

    # Row after row of the tile: does it read the page of each choice too, and how much of it?
    readers = tl.zeros([CHOICES], tl.int32)
    packed = tl.zeros([CHOICES], tl.int64)  # a byte a row
    reach = tl.zeros([CHOICES], tl.int32)
    least = tl.full([CHOICES], BLOCK, tl.int32)
    first_reader = tl.full([CHOICES], ROWS, tl.int32)
    other_place = tl.arange(0, TOPK_P)
    for nth_row in tl.static_range(ROWS):
        other = tl.zeros([TOPK_P], tl.int32) + (tile * ROWS + nth_row)
        other_seq, other_position = _places(other, query_starts, context_lens, num_rows, num_seqs)
        other_page, other_limit = _pages(
            blocks + (other * HEADS + head) * TOPK + other_place, other_place < TOPK, other_seq, other_position,
            page_table, table_stride, num_seqs, BLOCK=BLOCK,
        )  # fmt: skip
        same = (other_page[:, None] == page[None, :]) & exists[None, :]  # [TOPK_P, CHOICES]
        seen = tl.max(tl.where(same, other_limit[:, None], 0), axis=0)
        readers += (seen > 0).to(tl.int32)
        packed |= seen.to(tl.int64) << (8 * nth_row)
        reach = tl.maximum(reach, seen)
        least = tl.minimum(least, seen)
        first_reader = tl.minimum(first_reader, tl.where(seen > 0, nth_row, ROWS))
    shared = exists & (readers >= SHARE_FROM)
    leads = shared & (first_reader == choice // TOPK_P)
    # Pages that all rows of the tile see to the end come first: nothing of them needs a mask.
    whole = leads & (least == BLOCK)
    num_whole = tl.sum(whole.to(tl.int32), axis=0)
    in_parts = leads & (least < BLOCK)
    nth = tl.where(whole, tl.cumsum(whole.to(tl.int32), axis=0), num_whole + tl.cumsum(in_parts.to(tl.int32), axis=0))
    base = (tile * HEADS + head) * capacity + nth - 1
    tl.store(shared_page + base, page, mask=leads)
    tl.store(shared_limit + base, packed, mask=leads)
    tl.store(shared_reach + base, reach, mask=leads)
    tl.store(shared_count + tile * HEADS + head, tl.sum(leads.to(tl.int32), axis=0))
    tl.store(whole_count + tile * HEADS + head, num_whole)

    loose = exists & (readers < SHARE_FROM)
    window = (tile * ROWS) // WINDOW_ROWS
    key = (window * HEADS + head) * num_pages + page
    rank = tl.atomic_add(key_count + key, 1, mask=loose)
    tl.atomic_max(key_limit + key, limit, mask=loose)
    tl.atomic_max(key_hidden + key, BLOCK - limit, mask=loose & (limit < BLOCK))
    loose_by_row = tl.reshape(loose.to(tl.int32), [ROWS, TOPK_P])
    nth_loose = tl.reshape(tl.cumsum(loose_by_row, axis=1) - 1, [CHOICES])
    written = (row < num_rows) & (place < TOPK)
    tl.store(choice_key + flat, tl.where(loose, key, -1), mask=written)
    tl.store(choice_rank + flat, rank, mask=loose)
    tl.store(choice_slot + flat, flat - place + nth_loose, mask=loose)
    tl.store(choice_limit + flat, limit, mask=loose)
    tile_row = tile * ROWS + tl.arange(0, ROWS)
    tl.store(loose_count + tile_row * HEADS + head, tl.sum(loose_by_row, axis=1), mask=tile_row < num_rows)


@triton.jit(do_not_specialize=["keys_per_window"])
def _place_readers(
    key_count, key_start, reader_count, item_count, item_key, item_first,
    keys_per_window, window_choices, most_items, READERS_PER_ITEM: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Give each key a run of readers, and cut it into work items; both in the order in which programs come by."""
    window = tl.program_id(1)
    offset = tl.program_id(0) * KEYS + tl.arange(0, KEYS)
    mine = offset < keys_per_window
    key = window * keys_per_window + offset
    count = tl.load(key_count + key, mask=mine, other=0)
    total = tl.sum(count, axis=0)
    if total > 0:
        base = window * window_choices + tl.atomic_add(reader_count + window, total)
        tl.store(key_start + key, base + tl.cumsum(count, axis=0) - count, mask=mine)
        items = (count + READERS_PER_ITEM - 1) // READERS_PER_ITEM
        item_base = tl.atomic_add(item_count + window, tl.sum(items, axis=0))
        item = window * most_items + item_base + tl.cumsum(items, axis=0) - items
        for nth in range(tl.max(items, axis=0)):
            tl.store(item_key + item + nth, key, mask=nth < items)
            tl.store(item_first + item + nth, tl.zeros_like(key) + nth * READERS_PER_ITEM, mask=nth < items)


@triton.jit(do_not_specialize=["num_choices"])
def _fill_readers(
    choice_key, choice_rank, choice_slot, choice_limit, key_start, reader_slot, reader_limit, num_choices,
    CHOICES: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0) * CHOICES + tl.arange(0, CHOICES)
    key = tl.load(choice_key + choice, mask=choice < num_choices, other=-1)
    loose = key >= 0
    to = tl.load(key_start + key, mask=loose) + tl.load(choice_rank + choice, mask=loose)
    tl.store(reader_slot + to, tl.load(choice_slot + choice, mask=loose), mask=loose)
    tl.store(reader_limit + to, tl.load(choice_limit + choice, mask=loose), mask=loose)
