"""Choosing the next token: greedy, or by temperature and nucleus, with randomness of seed and position alone."""

import struct
from collections.abc import Sequence

import msgspec
import numpy as np
from pdkv_kernels.draw_ref import draw_rows, uniform
from pdkv_kernels.greedy_ref import NOT_FINITE
from torch import Tensor

from pdkv.errors import ModelError, RequestError
from pdkv.m3.logprobs import NO_TOP, TopLogprobs, Tops

Tokens = np.ndarray[tuple[int], np.dtype[np.int64]]
Logprobs = np.ndarray[tuple[int], np.dtype[np.float64]]

NO_TOKEN = NOT_FINITE
"""In an array of tokens: none."""

_SEED_BITS = 64
_FIELDS, _WORDS = struct.Struct("=ddQq"), struct.Struct("=4q")
_NUMBERS_AT_ONCE = 1 << 22
"""Logits that are looked at together: 32 MiB in float64, of which a draw makes some six more, and a nucleus ten."""


class SamplingParams(msgspec.Struct, frozen=True):
    """How one request's tokens are chosen. Raises ``RequestError`` for what cannot be done."""

    temperature: float = 0.0
    """0 is greedy."""
    seed: int = 0
    top_p: float = 1.0
    """Draw only from the smallest set of likeliest tokens that has this share of the probability; 0 leaves one."""

    def words(self, num_top: int) -> tuple[int, ...]:
        """These and how many likeliest tokens to tell, as a device is asked: ``pdkv_kernels.draw_ref.ASKED``."""
        return _WORDS.unpack(_FIELDS.pack(self.temperature, self.top_p, self.seed % (1 << _SEED_BITS), num_top))

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


class Choices(msgspec.Struct, frozen=True, gc=False):
    """What was chosen behind rows of a step, as a device told it: entry by entry, and no object for each."""

    tokens: Tokens  # int64 [num_entries]; NO_TOKEN where logits are not finite, and nothing can be chosen
    logprobs: Logprobs  # float64 [num_entries]
    tops: Tops | None = None
    """None where nobody asks for any."""

    def samples(self) -> list[Sample | None]:
        """One for each entry; None where there is no token."""
        tops = [NO_TOP] * len(self.tokens) if self.tops is None else self.tops.each()
        told = zip(self.tokens.tolist(), self.logprobs.tolist(), tops, strict=True)
        return [None if token == NO_TOKEN else Sample(token, logprob, top) for token, logprob, top in told]


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
        some = [params[row] for row in drawn]
        numbers = [uniform(params[row].seed, positions[row]) for row in drawn]
        rows = logits if len(drawn) == len(params) else logits[drawn]
        temperatures, shares = [param.temperature for param in some], [param.top_p for param in some]
        tokens[drawn] = draw_rows(rows, temperatures, shares, numbers)
    logprobs = logits.log_softmax(dim=-1)
    own = logprobs.gather(1, tokens[:, None])[:, 0]
    tops = [likeliest(logprobs[row], count) if count else NO_TOP for row, count in enumerate(num_top)]
    return list(map(Sample, tokens.tolist(), own.tolist(), tops or [NO_TOP] * len(params)))


def likeliest(logprobs: Tensor, count: int) -> TopLogprobs:  # logprobs: [vocab]
    """The ``count`` likeliest tokens, or all there are."""
    values, ids = logprobs.topk(min(count, logprobs.numel()))
    return TopLogprobs(tuple(ids.tolist()), tuple(values.tolist()))
