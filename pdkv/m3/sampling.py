"""Choosing the next token: greedy, or by temperature and nucleus, with randomness of seed and position alone."""

from collections.abc import Sequence

import msgspec
import numpy as np
import torch
from pdkv_kernels.greedy_ref import NOT_FINITE
from torch import Tensor

from pdkv.errors import ModelError, RequestError
from pdkv.m3.logprobs import NO_TOP, TopLogprobs

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]
Logprobs = np.ndarray[tuple[int], np.dtype[np.float64]]

NO_TOKEN = NOT_FINITE
"""In an array of tokens: none."""

_SEED_BITS = 64
_NUMBERS_AT_ONCE = 1 << 22
"""Logits that are looked at together: 32 MiB in float64, of which a draw makes some six more, and a nucleus ten."""


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


class GreedyChoices(msgspec.Struct, frozen=True, gc=False):
    """The likeliest tokens behind rows of a step, as a device told them: entry by entry, and no object for each."""

    tokens: Tokens  # int64 [num_entries]; NO_TOKEN where logits are not finite, and nothing can be chosen
    logprobs: Logprobs  # float64 [num_entries]

    def samples(self) -> list[Sample | None]:
        """One for each entry; None where there is no token."""
        told = zip(self.tokens.tolist(), self.logprobs.tolist(), strict=True)
        return [None if token == NO_TOKEN else Sample(token, logprob) for token, logprob in told]


def sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], num_top: Sequence[int] = ()
) -> list[Sample]:
    """One token a row.

    logits: float32 [num_rows, vocab]; ``positions[i]`` is where row i's new token will stand in its sequence, so the
    first token of prefill and those of decode draw what one undivided engine would draw, and no generator's state has
    to travel. Greedy takes the lowest id among equals. ``num_top[i]``: alternatives to tell of row i, none where it is
    left out. Raises ``ModelError`` when a row is not finite.

    In float64 on the logits' own device, and what a row gives hangs on no other row: a vocabulary of 200,000 takes a
    processor milliseconds a row, and a step has many.
    """
    damaged = (~logits.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if damaged:
        raise ModelError(f"the logits of rows {damaged} are not finite: the checkpoint or its state is damaged")
    samples: list[Sample] = []
    some = max(1, _NUMBERS_AT_ONCE // logits.shape[1])
    for begin in range(0, len(params), some):
        few = slice(begin, begin + some)
        samples += _sample(logits[few].detach().double(), params[few], positions[few], num_top[few])
    return samples


def _sample(
    logits: Tensor, params: Sequence[SamplingParams], positions: Sequence[int], num_top: Sequence[int]
) -> list[Sample]:  # logits: float64 [num_rows, vocab]
    tokens = logits.argmax(dim=-1)  # the lowest id among equals
    drawn = [row for row, param in enumerate(params) if param.temperature > 0]
    if drawn:
        uniform = [_uniform(params[row].seed, positions[row]) for row in drawn]
        rows = logits if len(drawn) == len(params) else logits[drawn]
        tokens[drawn] = _draw(rows, [params[row] for row in drawn], uniform)
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    tops = [likeliest(logprobs[row], count) if count else NO_TOP for row, count in enumerate(num_top)]
    return list(map(Sample, tokens.tolist(), own.tolist(), tops or [NO_TOP] * len(params)))


def likeliest(logprobs: Tensor, count: int) -> TopLogprobs:  # logprobs: [vocab]
    """The ``count`` likeliest tokens, or all there are."""
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    return TopLogprobs(tuple(ids.tolist()), tuple(values.tolist()))


def _draw(logits: Tensor, params: Sequence[SamplingParams], uniform: Sequence[float]) -> Tensor:  # int64 [num_rows]
    """Invert the cumulative distributions at ``uniform`` numbers, one a row.

    Tokens keep the order of their ids whatever ``top_p`` leaves out, so a nucleus of all of them changes no draw.
    """
    temperatures, wanted = (
        torch.tensor(column, dtype=logits.dtype, device=logits.device)
        for column in ([param.temperature for param in params], uniform)
    )
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(temperatures[:, None]).exp_()
    nuclei = [row for row, param in enumerate(params) if param.top_p < 1.0]
    if nuclei:
        cut = weights[nuclei]
        weights[nuclei] = torch.where(_nucleus(cut, [params[row].top_p for row in nuclei]), cut, 0.0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum(total * wanted, total.nextafter(torch.zeros_like(total)))  # the end itself is nobody's
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _nucleus(weights: Tensor, top_p: Sequence[float]) -> Tensor:  # [num_rows, vocab], sums not 1 -> bool, same shape
    """The fewest likeliest tokens that have ``top_p`` of all weight: those before which less than that has come.

    At least one; of equals those with the lowest ids.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    shares = torch.tensor(top_p, dtype=weights.dtype, device=weights.device)
    kept = before < (shares * ordered.sum(dim=-1))[:, None]
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(1, order, kept)


def _uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 random bits: Philox is a hash of its key, here (seed, position)."""
    key = np.array([seed % (1 << _SEED_BITS), position], dtype=np.uint64)
    raw = int(np.random.Philox(key=key).random_raw())
    return (raw >> 11) * 2.0**-53
