"""Tiles of consecutive query rows of one sequence each, found inside a kernel: grids come from shapes alone."""

import triton
import triton.language as tl


def most_tiles(num_rows: int, num_seqs: int, tile_rows: int) -> int:
    """No batch of so many rows and sequences has more tiles."""
    return int(triton.cdiv(num_rows, tile_rows)) + num_seqs - 1


@triton.jit
def tile_sequence(tile, query_starts, num_seqs, first_row, end_row, ROWS: tl.constexpr):
    """Sequence of a tile and the number of tiles before the sequence; -1 where there is no such tile.

    Only rows from first_row to end_row are cut into tiles.
    """
    seq, before, tiles_before = tl.full([], -1, tl.int32), 0, 0
    for first_seq in range(0, num_seqs, 16):
        some = first_seq + tl.arange(0, 16)
        begin = tl.maximum(tl.load(query_starts + some, mask=some < num_seqs, other=0), first_row)
        end = tl.minimum(tl.load(query_starts + some + 1, mask=some < num_seqs, other=0), end_row)
        tiles = (tl.maximum(end - begin, 0) + ROWS - 1) // ROWS
        ends = tiles_before + tl.cumsum(tiles, axis=0)
        mine = (tile < ends) & (tile >= ends - tiles)
        seq = tl.maximum(seq, tl.max(tl.where(mine, some, -1), axis=0))
        before = tl.maximum(before, tl.max(tl.where(mine, ends - tiles, 0), axis=0))
        tiles_before += tl.sum(tiles, axis=0)
    return seq, before
