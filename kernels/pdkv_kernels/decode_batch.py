"""What decode kernels take: a batch in which every sequence has the same number of query rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from pdkv_kernels.paged import RaggedQueries


@dataclass(frozen=True)
class DecodeBatch:
    """The newest ``query_len`` tokens of each sequence, as query rows ``seq * query_len + i``.

    Row i of a sequence stands at position ``seq_lens[seq] - query_len + i`` and sees the keys up to that position. A
    padded sequence has length 0; its rows see nothing. Only shapes decide what is launched, so a CUDA graph that
    holds the kernels may be replayed after the tensors' contents have changed.
    """

    seq_lens: Tensor  # int32 [num_seqs], all keys, the query rows' own included
    page_table: Tensor  # int32 [num_seqs, max_blocks], physical page of each block, padded with -1
    query_len: int
    settled: bool = False
    """A promise: lengths, the page table and the keys of blocks without any of the newest ``query_len`` tokens are what
    they are since before the first of those kernels began that may still run when this batch's first kernel starts.

    Kernels launched with the right to overlap (``launch.py``) may all still run, back to the last ordinary launch among
    them, which waited for all before it. With the promise a kernel may read these before its turn.
    """

    @property
    def num_seqs(self) -> int:
        return self.seq_lens.shape[0]


def uniform_batch(queries: RaggedQueries, num_rows: int) -> DecodeBatch:
    """Ragged queries of one length as a decode batch; their starts must be multiples of it, which is not checked.

    Runs on the queries' device without waiting for it. ValueError if the rows cannot be shared out evenly.
    """
    num_seqs = queries.context_lens.shape[0]
    if num_seqs == 0 or num_rows % num_seqs:
        raise ValueError(f"{num_rows} query rows of {num_seqs} sequences: decode takes equally many of each sequence")
    seq_lens = queries.context_lens + queries.query_starts.diff().to(torch.int32)
    return DecodeBatch(seq_lens, queries.page_table, num_rows // num_seqs)
