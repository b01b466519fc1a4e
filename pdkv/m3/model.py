"""MiniMax-M3's text model: one forward step over a ragged batch, with all its state in pages."""

from pathlib import Path

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

from pdkv.errors import CapacityError, ModelError
from pdkv.m3.attention import KvViews, StepBatch, attend, attention_step, select, store
from pdkv.m3.config import IndexScheduleOverride, M3Config, load_config
from pdkv.m3.layer_progress import OnStored
from pdkv.m3.layers import feed_forward
from pdkv.m3.operations import operations_for
from pdkv.m3.parallel import SOLO, Group
from pdkv.m3.random_weights import random_weights
from pdkv.m3.sharding import ModelShare, model_share
from pdkv.m3.weights import M3Weights, load_weights, weight_bytes

__all__ = ["KvViews", "M3Model", "StepBatch", "load_model"]

_DTYPES = ("float32", "bfloat16", "float16")


class M3Model:
    """The weights of one rank on one device. Holds no state between steps, so one model may serve any number of caches.

    ``forward``, ``hidden`` and ``logits`` are collective: every rank of ``group`` calls them in the same order with
    equal arguments, each with its own cache, and they raise ``RankLostError`` when another rank does not answer.
    Not for two threads at once only because torch's own threads would be shared.
    """

    def __init__(
        self, config: M3Config, weights: M3Weights, device: str | torch.device = "cpu", group: Group = SOLO
    ) -> None:
        self.config = config
        self.group = group
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, config.dtype)
        """What K/V and index keys are stored in unless told otherwise; maths on a CPU is float32 all the same."""
        self._weights = weights
        self._operations = operations_for(config, self.device, weights.embed.dtype)
        self.can_capture = self._operations.can_capture and group.size == 1
        """Decode steps may be captured in CUDA graphs."""

    @torch.no_grad()
    def forward(self, batch: StepBatch, cache: KvViews) -> Tensor | None:
        """One step: float32 logits [num_logits, vocab]. ``logits`` of ``hidden``. Collective."""
        return self.logits(self.hidden(batch, cache))

    @torch.no_grad()
    def logits(self, hidden: Tensor) -> Tensor | None:  # [num_rows, hidden] -> float32 [num_rows, vocab]
        """What lm_head says of rows of ``hidden``; apart, because a row of logits is much larger than its source.

        Collective: every rank computes its part of the vocabulary, rank 0 gets all of it and the others ``None``.
        """
        mine = functional.linear(hidden, self._weights.lm_head).float()  # [num_rows, vocab_rows]
        whole = self.group.gather_columns(mine)
        return None if whole is None else whole[:, : self.config.vocab_size]

    def empty_logits(self, num_rows: int) -> Tensor:
        """Room for ``plain_logits``: the weights' dtype [num_rows, rows of lm_head]."""
        head = self._weights.lm_head
        return torch.empty(num_rows, head.shape[0], dtype=head.dtype, device=head.device)

    def plain_logits(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """``logits`` before they are widened, of a model that is not divided: [num_rows, hidden] -> the weights' dtype
        [num_rows, vocab]. Into the first rows of ``room``, where there is one."""
        assert self.group.size == 1, "a rank has a part of the vocabulary"
        out = None if room is None else room[: hidden.shape[0]]
        return torch.mm(hidden, self._weights.lm_head.t(), out=out)[:, : self.config.vocab_size]

    @torch.no_grad()
    def hidden(self, batch: StepBatch, cache: KvViews, on_stored: OnStored | None = None) -> Tensor:
        """One step: the wanted rows as lm_head takes them, [num_logits, hidden], the same bits on every rank.

        Collective: two sums a layer and one of embeddings.
        Writes k, v and index_k of the batch's tokens into their pages of ``cache``, then attends to them and to all
        that the pages held for earlier positions. Bytes of later positions are never looked at.

        ``on_stored`` is called once a layer, in order, unless no row is wanted: with several ranks after the layer's
        first sum, which none of them leaves before all have come to it, and so have stored.
        """
        config, weights = self.config, self._weights
        step = attention_step(batch, config, self._operations)
        operations, eps = self._operations, config.rms_norm_eps
        x = self._embedded(batch.token_ids)  # [num_tokens, hidden]
        normed = operations.norm(x, weights.layers[0].input_norm, eps)
        last = config.num_layers - 1
        blocks = None  # of the last sparse layer of this step, for those that reuse a selection
        for number, layer in enumerate(weights.layers):
            asked = store(normed, number, layer.attention, step, cache, config)
            if number == last and batch.logits_rows.numel() == 0:
                break  # a chunk of a longer prompt: nobody reads what the last layer would say
            if on_stored is not None and self.group.size == 1:
                on_stored(number + 1)
            sparse = config.sparse_layers[number]
            if sparse:
                blocks = select(asked, number, step, cache, config, blocks)
            more = self.group.sum(attend(asked, blocks if sparse else None, number, layer.attention, step, cache))
            if on_stored is not None and self.group.size > 1:
                on_stored(number + 1)
            x, normed = operations.add_norm(x, more, layer.post_attention_norm, eps)
            more = self.group.sum(feed_forward(normed, layer.mlp, config, operations))
            if number == last:
                x = x + more
            else:
                x, normed = operations.add_norm(x, more, weights.layers[number + 1].input_norm, eps)
        return operations.norm(x[batch.logits_rows], weights.norm, eps)

    def _embedded(self, token_ids: Tensor) -> Tensor:
        """Each token's row comes from the one rank that has it; the others add zeros."""
        vocab, embed = self._weights.vocab, self._weights.embed
        if self.group.size == 1:
            return functional.embedding(token_ids, embed)
        local = token_ids - vocab.start
        elsewhere = (local < 0) | (local >= len(vocab))
        rows = functional.embedding(local.masked_fill(elsewhere, 0), embed)
        return self.group.sum(rows.masked_fill(elsewhere[:, None], 0))


def load_model(
    model_dir: Path,
    device: str = "cpu",
    dtype: str = "auto",
    schedule: IndexScheduleOverride | None = None,
    *,
    config: M3Config | None = None,
    group: Group = SOLO,
    expert_parallel: bool = False,
    load_format: str = "auto",
) -> M3Model:
    """Load one rank's share of a checkpoint directory: all of it without a group.

    ``dtype``: float32, bfloat16, float16, or auto for the checkpoint's own; weights are rounded to it, and
    ``model.dtype`` is it. On a CPU they are then held, and all maths is done, in float32: faster there, and never less
    exact; a bfloat16 checkpoint takes twice its size. ``config`` goes before the checkpoint's own, and ``schedule``
    before that one's. ``expert_parallel``: ranks hold whole experts instead of columns of all. ``load_format``
    dummy: the directory needs no more than a config.json, and weights are drawn at random.

    Loading is no collective. Raises ``ModelError`` for a number of ranks that does not divide the model, and
    ``CapacityError`` that says by how much a GPU is too small for the weights.
    """
    config = load_config(model_dir, schedule) if config is None else config
    share = model_share(config, group.rank, group.size, expert_parallel)
    if dtype != "auto":
        if dtype not in _DTYPES:
            raise ModelError(f"dtype {dtype!r} is not one of auto, {', '.join(_DTYPES)}")
        config = msgspec.structs.replace(config, dtype=dtype)
    held = torch.float32 if torch.device(device).type == "cpu" else getattr(torch, config.dtype)
    _check_room(config, share, held, torch.device(device))
    if load_format == "dummy":
        weights = random_weights(config, device, held, share)
    else:
        weights = load_weights(model_dir, config, device, held, share)
    return M3Model(config, weights, device, group)


def _check_room(config: M3Config, share: ModelShare, held: torch.dtype, device: torch.device) -> None:
    """Before anything is read: what does not fit fails after minutes otherwise, and says less."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    needed = weight_bytes(config, share, held.itemsize)
    if needed > free:
        raise CapacityError(
            f"rank {share.rank} of {share.size} has {needed:,} bytes of weights, and {free:,} of {total:,} are free on "
            f"{device}: {needed - free:,} too few. Divide the model among more ranks (--tp), or make room on the GPU"
        )
