"""Choosing the next token: greedy, or by temperature with randomness that depends on seed and position alone."""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from torch import Tensor

from pdkv.errors import ModelError, RequestError

_SEED_BITS = 64


class SamplingParams(msgspec.Struct, frozen=True):
    """How one request's tokens are chosen. Raises ``RequestError`` for what cannot be done."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}, must be 0 or more", param="temperature")
        if not -(1 << (_SEED_BITS - 1)) <= self.seed < 1 << _SEED_BITS:
            raise RequestError(f"seed is {self.seed}, must fit {_SEED_BITS} bits", param="seed")


def sample(logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int]) -> tuple[list[int], list[float]]:
    """One token a row, and its log-probability under the plain softmax (temperature 1).

    logits: float32 [num_rows, vocab]; ``positions[i]`` is where row i's new token will stand in its sequence, so the
    first token of prefill and those of decode draw what one undivided engine would draw, and no generator's state has
    to travel. Greedy takes the lowest id among equals. Raises ``ModelError`` when a row is not finite.
    """
    wide = logits.detach().to("cpu", torch.float64)
    damaged = ~wide.isfinite().all(dim=1)
    if bool(damaged.any()):
        rows = damaged.nonzero().flatten().tolist()
        raise ModelError(f"the logits of rows {rows} are not finite: the checkpoint or its state is damaged")
    logprobs = wide.log_softmax(dim=-1)
    ids = []
    for row, param, position in zip(wide, params, positions, strict=True):
        ids.append(_greedy(row) if param.temperature == 0.0 else _draw(row, param, position))
    return ids, [float(logprobs[i, token]) for i, token in enumerate(ids)]


def _greedy(row: Tensor) -> int:
    return int((row == row.max()).nonzero()[0])


def _draw(row: Tensor, param: SamplingParams, position: int) -> int:
    """Invert the cumulative distribution at a uniform number that (seed, position) alone determine."""
    scaled = (row - row.max()) / param.temperature
    cumulative = scaled.exp().cumsum(dim=-1)
    target = cumulative[-1] * _uniform(param.seed, position)
    return min(int(torch.searchsorted(cumulative, target, right=True)), row.numel() - 1)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 random bits: Philox is a hash of its key, here (seed, position)."""
    key = np.array([seed % (1 << _SEED_BITS), position], dtype=np.uint64)
    raw = int(np.random.Philox(key=key).random_raw())
    return (raw >> 11) * 2.0**-53
