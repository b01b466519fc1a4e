"""The choice of blocks in decode without sorting: up to 16 of a table of up to 1,024 blocks, on Hopper or later.

A sort compares and exchanges in many steps of which each waits for the one before. Here the blocks that may be chosen
are listed, and ranked by counting how many are better, each by a thread of its own; the choice is exact, and the same
as ``index_selection``'s kernel makes.

It is one block of assembly in a Triton kernel (``choice_text``), for Triton can neither append to a list that threads
share nor count into one.
"""

import triton
import triton.language as tl
from torch import Tensor

from pdkv_kernels.choice_text import FEW_BLOCKS, MOST_PLACES, choice_cut, choice_ptx
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.launch import chained, launch_options

MOST_BLOCKS = 1024
"""With more, the scan notes groups."""
MOST_OF_FEW = 264
"""Two for each of an H200's multiprocessors. More of two warps each are slower in front of a scan than as many of one,
which sort."""


def choice_fits(out: Tensor, keys: Tensor, max_blocks: int) -> bool:
    """Whether ``choose_by_counting`` takes tables of so many blocks, with rows of keys as the scan leaves them."""
    return (
        chained()
        and (max_blocks > FEW_BLOCKS or out.shape[0] * out.shape[1] <= MOST_OF_FEW)
        and max_blocks <= MOST_BLOCKS
        and out.shape[2] <= MOST_PLACES
        and keys.stride(0) % 4 == 0
        and keys.data_ptr() % 16 == 0
    )


def choose_by_counting(out: Tensor, keys: Tensor, batch: DecodeBatch, successor: int) -> None:
    """``index_selection.select_blocks`` where ``choice_fits`` and the scan has noted no groups."""
    num_rows, heads, topk = out.shape
    cut = choice_cut(batch.page_table.shape[1], topk, successor)
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
        **launch_options(True, cut.warps, 1),
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
