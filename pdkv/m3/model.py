"""MiniMax-M3's text model: one forward step over a ragged batch, with all its state in pages."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class StepBatch:
    """One step for several sequences, ragged; prefill chunks and decode rows mix freely. All on the model's device.

    Sequence s owns the rows ``query_starts[s]`` to ``query_starts[s + 1]`` of the flattened tokens; its row i stands
    at position ``context_lens[s] + i``. Its pages must hold room for every position up to its last row.
    """

    token_ids: Tensor  # int64 [num_tokens]
    positions: Tensor  # int64 [num_tokens]
    query_starts: Tensor  # int32 [num_seqs + 1]
    context_lens: Tensor  # int32 [num_seqs], tokens in the cache before this step
    page_table: Tensor  # int32 [num_seqs, max_blocks], physical page of each block, padded with -1
    logits_rows: Tensor  # int64 [num_logits], rows of the flattened tokens whose logits are wanted


class KvViews(Protocol):
    """Where the state lives. Views may have any strides but 1 in the last dimension; the arena owns the memory."""

    def view(self, name: str, layer: int) -> Tensor:
        """The pages of one kind of payload of one layer (global id), with only the kv heads of this rank.

        k, v: ``[num_pages, num_kv_heads, block_size, head_dim]``; k_scale, v_scale: ``[num_pages, num_kv_heads,
        block_size]``; index_k: ``[num_pages, block_size, index_dim]``.
        """
        ...


