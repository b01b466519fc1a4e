"""Scoring a prompt: the log-probability of tokens that stand there already, and the likeliest in their place."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pdkv.m3.logprobs import PromptLogprobs
from pdkv.m3.model import M3Model

_ROWS_AT_ONCE = 64
"""Logits of a vocabulary of 200,000 in float32 are 51 MB for these, and 82 GB for a prompt of 100,000 tokens."""


def score(model: M3Model, hidden: Tensor, targets: Sequence[int], num_top: int) -> PromptLogprobs | None:
    """How likely each target was after its row of ``hidden`` [num_targets, hidden].

    Natural logarithms under the plain softmax, in float32, as OpenAI's ``logprobs`` are. None where one is not finite,
    and on every rank but the first. Collective: all make the same calls, also behind a row that is not finite.
    """
    num_top = min(num_top, model.config.vocab_size)
    own, top_ids, top = [], [], []
    sound = model.group.rank == 0
    for begin in range(0, len(targets), _ROWS_AT_ONCE):
        chosen = torch.tensor(targets[begin : begin + _ROWS_AT_ONCE], device=hidden.device)
        logits = model.logits(hidden[begin : begin + _ROWS_AT_ONCE])  # float32 [num_rows, vocab]
        if logits is None or not sound:
            continue
        logprobs = logits.log_softmax(dim=-1)
        own.append(logprobs.gather(1, chosen[:, None])[:, 0].cpu().numpy())
        values, ids = logprobs.topk(num_top, dim=-1)
        top_ids.append(ids.cpu().numpy())
        top.append(values.cpu().numpy())
        sound = bool(logits.isfinite().all())
    if not sound:
        return None
    return PromptLogprobs.pack(np.concatenate(own), np.concatenate(top_ids), np.concatenate(top))
