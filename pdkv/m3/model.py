"""MiniMax-M3's text model: one forward step over a ragged batch, with all its state in pages."""

from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from pdkv_kernels.paged import RaggedQueries
from torch import Tensor
from torch.nn import functional

from pdkv.errors import ModelError
from pdkv.m3.attention import KvViews, attend, attention_step, select, store
from pdkv.m3.config import IndexScheduleOverride, M3Config, load_config
from pdkv.m3.layers import feed_forward, norm
from pdkv.m3.weights import M3Weights, load_weights

__all__ = ["KvViews", "M3Model", "StepBatch", "load_model"]


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


class M3Model:
    """The weights on one device. Holds no state between steps, so one model may serve any number of caches.

    Not for two threads at once only because torch's own threads would be shared.
    """

    def __init__(self, config: M3Config, weights: M3Weights, device: str | torch.device = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        """What K/V and index keys are stored in unless told otherwise; maths on a CPU is float32 all the same."""
        self._weights = weights

    @torch.no_grad()
    def forward(self, batch: StepBatch, cache: KvViews) -> Tensor:
        """One step: float32 logits [num_logits, vocab]. ``logits`` of ``hidden``."""
        return self.logits(self.hidden(batch, cache))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor:  # [num_rows, hidden] -> float32 [num_rows, vocab]
        """What lm_head says of rows of ``hidden``; apart, because a row of logits is much larger than its source."""
        return functional.linear(hidden, self._weights.lm_head).float()

    @torch.no_grad()
    def hidden(self, batch: StepBatch, cache: KvViews) -> Tensor:
        """One step: the wanted rows as lm_head takes them, [num_logits, hidden].

        Writes k, v and index_k of the batch's tokens into their pages of ``cache``, then attends to them and to all
        that the pages held for earlier positions. Bytes of later positions are never looked at.
        """
        config, weights = self.config, self._weights
        queries = RaggedQueries(batch.query_starts, batch.context_lens, batch.page_table)
        step = attention_step(queries, batch.positions, config)
        x = functional.embedding(batch.token_ids, weights.embed)  # [num_tokens, hidden]
        last = config.num_layers - 1
        blocks = None  # of the last sparse layer of this step, for those that reuse a selection
        for number, layer in enumerate(weights.layers):
            asked = store(self._normed(x, layer.input_norm), number, layer.attention, step, cache, config)
            if number == last and batch.logits_rows.numel() == 0:
                break  # a chunk of a longer prompt: nobody reads what the last layer would say
            sparse = config.sparse_layers[number]
            if sparse:
                blocks = select(asked, number, step, cache, config, blocks)
            x = x + attend(asked, blocks if sparse else None, number, layer.attention, step, cache)
            x = x + feed_forward(self._normed(x, layer.post_attention_norm), layer.mlp, config)
        return self._normed(x[batch.logits_rows], weights.norm)

    def _normed(self, x: Tensor, weight: Tensor) -> Tensor:
        return norm(x, weight, self.config.rms_norm_eps)


def load_model(
    model_dir: Path, device: str = "cpu", dtype: str = "auto", schedule: IndexScheduleOverride | None = None
) -> M3Model:
    """Load a checkpoint directory. ``dtype``: float32, bfloat16, or auto for the checkpoint's own. ``schedule`` goes
    before the checkpoint's.

    Weights are rounded to that dtype, and ``model.dtype`` is it.
    On a CPU they are then held, and all maths is done, in float32: faster there, and never less exact.
    """
    config = load_config(model_dir, schedule)
    if dtype != "auto":
        if dtype not in ("float32", "bfloat16"):
            raise ModelError(f"dtype {dtype!r} is not one of auto, float32, bfloat16")
        config = msgspec.structs.replace(config, dtype=dtype)
    held = torch.float32 if torch.device(device).type == "cpu" else getattr(torch, config.dtype)
    return M3Model(config, load_weights(model_dir, config, device, held), device)
