"""Causal attention to selected blocks: rows that chose the same block share a tile; softmax sums run across tiles."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries, row_positions, row_sequences

_TILE_ROWS = 64
"""Most rows of one tile; fewer when blocks are chosen by fewer rows, 1 in plain decode."""
_GROUP_ELEMENTS = 1 << 18
"""Elements of q that are attended to at once; tiles are taken in groups of this many."""


@dataclass(frozen=True)
class _Tiles:
    """Tile t: readers of block ``block[t]`` of sequence ``seq[t]`` that chose it for kv head ``head[t]``."""

    seq: Tensor  # int64 [num_tiles]
    head: Tensor  # int64 [num_tiles]
    block: Tensor  # int64 [num_tiles]
    reader: Tensor  # int64 [num_tiles, tile_rows], row * kv_heads + head; num_rows * kv_heads is padding


@dataclass(frozen=True)
class _Softmax:
    """Running state of every reader, q heads of one kv head side by side; updated in place. The last is padding."""

    top: Tensor  # float32 [num_readers + 1, share], largest logit so far
    total: Tensor  # float32 [num_readers + 1, share], sum of weights relative to it
    sums: Tensor  # float32 [num_readers + 1, share, head_dim], sum of weighted V


def sparse_attention_ref(
    q: Tensor, kv: PagedKv, blocks: Tensor, queries: RaggedQueries, scale: float
) -> tuple[Tensor, Tensor]:
    """Attend from q: [num_rows, num_heads, head_dim] to the visible keys of the blocks chosen for its kv head.

    blocks: int32 [num_rows, num_kv_heads, topk], logical ids in any order, no id twice; -1 and blocks that the row
    cannot see are passed over. Returns the output in q's dtype and the natural log of the softmax's sum, float32
    [num_rows, num_heads]; a row without any block gives 0 and -inf.
    """
    num_rows, num_heads, dim = q.shape
    kv_heads = blocks.shape[1]
    readers, share = num_rows * kv_heads, num_heads // kv_heads
    positions = row_positions(queries)
    tiles = _make_tiles(blocks, row_sequences(queries.query_starts), positions, queries.page_table.shape[1])
    num_keys = queries.context_lens.long() + queries.query_starts.long().diff()  # [num_seqs]
    wide = q.new_zeros(readers + 1, share, dim, dtype=torch.float32)
    wide[:-1] = (q.float() * scale).view(readers, share, dim)
    far = num_keys.max().expand(1)  # padding sees everything, so it never calls for a mask
    limits = torch.cat((positions.repeat_interleave(kv_heads), far))  # [readers + 1], last visible position
    # A finite floor instead of -inf: the difference of two of them is 0, not NaN.
    floor = torch.full_like(wide[..., 0], torch.finfo(torch.float32).min)
    state = _Softmax(floor, torch.zeros_like(floor), torch.zeros_like(wide))
    group = max(1, _GROUP_ELEMENTS // (tiles.reader.shape[1] * share * dim))
    for begin in range(0, tiles.reader.shape[0], group):
        mine = slice(begin, begin + group)
        part = _Tiles(tiles.seq[mine], tiles.head[mine], tiles.block[mine], tiles.reader[mine])
        _attend(wide, kv, part, limits, queries.page_table, num_keys, state)
    total = state.total[:-1].view(num_rows, num_heads)
    out = state.sums[:-1].view(q.shape) / total.clamp(min=1e-30)[..., None]
    return out.to(q.dtype), state.top[:-1].view(num_rows, num_heads) + total.log()


def _make_tiles(blocks: Tensor, seqs: Tensor, positions: Tensor, max_blocks: int) -> _Tiles:
    """Sort all choices by (sequence, kv head, block) and cut runs of equal ones into tiles of equally many rows."""
    num_rows, kv_heads, _ = blocks.shape
    wide = blocks.long()
    taken = (wide >= 0) & (wide <= (positions // BLOCK)[:, None, None])
    heads = torch.arange(kv_heads, device=blocks.device)[:, None]
    key = (seqs[:, None, None] * kv_heads + heads) * max_blocks + wide  # [num_rows, kv_heads, topk]
    reader = torch.arange(num_rows * kv_heads, device=blocks.device).view(num_rows, kv_heads, 1).expand_as(key)
    keys, order = key[taken].sort(stable=True)  # [num_choices]
    runs, run, counts = torch.unique_consecutive(keys, return_inverse=True, return_counts=True)
    tile_rows = _tile_rows(counts)
    tiles_of_run = (counts + tile_rows - 1) // tile_rows
    first_tile = tiles_of_run.cumsum(0) - tiles_of_run
    nth = torch.arange(keys.numel(), device=keys.device) - (counts.cumsum(0) - counts)[run]
    readers = key.new_full((int(tiles_of_run.sum()), tile_rows), num_rows * kv_heads)
    readers[first_tile[run] + nth // tile_rows, nth % tile_rows] = reader[taken][order]
    tile_key = runs.repeat_interleave(tiles_of_run)
    owner = tile_key // max_blocks
    return _Tiles(owner // kv_heads, owner % kv_heads, tile_key % max_blocks, readers)


def _tile_rows(counts: Tensor) -> int:
    """A power of two near the mean number of rows that chose a block, so that little is padded and K/V read seldom."""
    if counts.numel() == 0:
        return 1
    mean = int(counts.float().mean())
    return min(_TILE_ROWS, 1 << max(0, mean - 1).bit_length())


def _attend(
    wide: Tensor, kv: PagedKv, tiles: _Tiles, limits: Tensor, page_table: Tensor, num_keys: Tensor, state: _Softmax
) -> None:
    """Add these tiles to the state. A reader may stand in several of them: all weigh by the largest logit of all."""
    _, share, dim = wide.shape
    num_tiles, tile_rows = tiles.reader.shape
    readers = tiles.reader.flatten()
    starts = tiles.block * BLOCK
    pages = page_table[tiles.seq, tiles.block].long()
    left = num_keys[tiles.seq] - starts  # keys that the sequence has from here on
    k = _load(kv.k, kv.k_scale, pages, tiles.head, left)
    logits = wide[readers].view(num_tiles, tile_rows * share, dim) @ k.transpose(1, 2)
    last_seen = limits[tiles.reader] - starts[:, None]  # [num_tiles, tile_rows], offset in the block
    if int(last_seen.min()) < BLOCK - 1:
        hidden = torch.arange(BLOCK, device=wide.device) > last_seen[..., None]
        logits.view(num_tiles, tile_rows, share, BLOCK).masked_fill_(hidden[:, :, None, :], -torch.inf)

    old_top = state.top.clone()
    rows = readers[:, None].expand(-1, share)
    state.top.scatter_reduce_(0, rows, logits.amax(dim=-1).view(-1, share), "amax")
    fade = (old_top - state.top).exp_()
    state.total.mul_(fade)
    state.sums.mul_(fade[..., None])
    weights = logits.sub_(state.top[readers].view(num_tiles, tile_rows * share, 1)).exp_()
    v = _load(kv.v, kv.v_scale, pages, tiles.head, left)
    state.total.index_add_(0, readers, weights.sum(dim=-1).view(-1, share))
    state.sums.index_add_(0, readers, (weights @ v).view(-1, share, dim))


def _load(pages: Tensor, scales: Tensor | None, ids: Tensor, heads: Tensor, left: Tensor) -> Tensor:
    """One head of one page a tile, float32 [num_tiles, BLOCK, head_dim]; rows past the sequence's end are 0."""
    rows = pages[ids, heads].float()
    if scales is not None:
        rows = rows * scales[ids, heads][..., None]
    if int(left.min()) < BLOCK:
        ends = (left < BLOCK).nonzero()[:, 0]  # tiles, few of all
        beyond = torch.arange(BLOCK, device=left.device) >= left[ends, None]
        rows[ends] = rows[ends].masked_fill_(beyond[..., None], 0.0)
    return rows
