"""Choosing the next token: greedy, or by temperature and nucleus, with randomness of seed and position alone."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from torch import Tensor

from pdkv.errors import ModelError, RequestError
from pdkv.m3.logprobs import NO_TOP, TopLogprobs

_SEED_BITS = 64


class SamplingParams(msgspec.Struct, frozen=True):
    """How one request's tokens are chosen. Raises ``RequestError`` for what cannot be done."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    top_p: float = 1.0
    """Draw only from the smallest set of likeliest tokens that has this share of the probability; 0 leaves one."""

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise RequestError(f"temperature is {self.temperature}, must be 0 or more", param="temperature")
        if not 0.0 <= self.top_p <= 1.0:
            raise RequestError(f"top_p is {self.top_p}, must be from 0 to 1", param="top_p")
        if not -(1 << (_SEED_BITS - 1)) <= self.seed < 1 << _SEED_BITS:
            raise RequestError(f"seed is {self.seed}, must fit {_SEED_BITS} bits", param="seed")


class Sample(msgspec.Struct, frozen=True, gc=False):
    """A chosen token, and log-probabilities under the plain softmax (temperature 1, every token)."""

    token: int
    logprob: float
    top: TopLogprobs = NO_TOP


class GreedyChoices(NamedTuple):
    """The likeliest tokens behind rows of a step, as a device told them: entry by entry, and no object for each."""

    tokens: list[int]
    logprobs: list[float]
    damaged: frozenset[int] = frozenset()
    """Entries whose logits are not finite: nothing can be chosen there."""

    def samples(self) -> list[Sample | None]:
        """One for each entry; None for those that are damaged."""
        told = enumerate(zip(self.tokens, self.logprobs, strict=True))
        return [None if place in self.damaged else Sample(token, logprob) for place, (token, logprob) in told]


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], num_top: Sequence[int] = ()
) -> list[Sample]:
    """One token a row.

    logits: float32 [num_rows, vocab]; ``positions[i]`` is where row i's new token will stand in its sequence, so the
    first token of prefill and those of decode draw what one undivided engine would draw, and no generator's state has
    to travel. Greedy takes the lowest id among equals. ``num_top[i]``: alternatives to tell of row i, none where it is
    left out. Raises ``ModelError`` when a row is not finite.
    """
    wide = logits.detach().to("cpu", torch.float64)
    damaged = ~wide.isfinite().all(dim=1)
    if bool(damaged.any()):
        rows = damaged.nonzero().flatten().tolist()
        raise ModelError(f"the logits of rows {rows} are not finite: the checkpoint or its state is damaged")
    logprobs = wide.log_softmax(dim=-1)
    samples = []
    for row, (param, position) in enumerate(zip(params, positions, strict=True)):
        token = _greedy(wide[row]) if param.temperature == 0.0 else _draw(wide[row], param, position)
        top = likeliest(logprobs[row], num_top[row]) if num_top and num_top[row] else NO_TOP
        samples.append(Sample(token, float(logprobs[row, token]), top))
    return samples


def likeliest(logprobs: Tensor, count: int) -> TopLogprobs:  # logprobs: [vocab]
    """The ``count`` likeliest tokens, or all there are."""
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    return TopLogprobs(tuple(ids.tolist()), tuple(values.tolist()))


def _greedy(row: Tensor) -> int:
    return int((row == row.max()).nonzero()[0])


def _draw(row: Tensor, param: SamplingParams, position: int) -> int:
    """Invert the cumulative distribution at a uniform number that (seed, position) alone determine.

    Tokens keep the order of their ids whatever ``top_p`` leaves out, so a nucleus of all of them changes no draw.
    """
    weights = ((row - row.max()) / param.temperature).exp()
    if param.top_p < 1.0:
        weights = torch.where(_nucleus(weights, param.top_p), weights, 0.0)
    cumulative = weights.cumsum(dim=-1)
    total = float(cumulative[-1])
    target = min(total * _uniform(param.seed, position), math.nextafter(total, 0.0))  # the end itself is nobody's
    return int(torch.searchsorted(cumulative, target, right=True))


def _nucleus(weights: Tensor, top_p: float) -> Tensor:  # weights: [vocab], sum not 1 -> bool [vocab]
    """The fewest likeliest tokens that have ``top_p`` of all weight: those before which less than that has come.

    At least one; of equals those with the lowest ids.
    """
    ordered, order = weights.sort(descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = before < top_p * ordered.sum()
    kept[0] = True
    return torch.zeros_like(kept).index_put((order,), kept)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 random bits: Philox is a hash of its key, here (seed, position)."""
    key = np.array([seed % (1 << _SEED_BITS), position], dtype=np.uint64)
    raw = int(np.random.Philox(key=key).random_raw())
    return (raw >> 11) * 2.0**-53
