"""What ``pdkv bench serve`` asks of a server, what each request came to, and how a run is summed up."""

import random
from collections import Counter
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from pdkv.daemons.link import TransferReport
from pdkv.errors import ConfigError
from pdkv.verify import link_chasing

SAFE_IDS = (3, 1000)
"""Of random prompts where nothing is known of the vocabulary: every real one has these."""

Tell = Callable[[str], None]


class Load(msgspec.Struct, frozen=True):
    """So many clients, each of which sends its next request when its last one is answered."""

    concurrency: int = 4
    requests: int = 16
    input_tokens: int = 1024
    output_tokens: int = 32
    seed: int = 0
    logprobs: bool = False
    """Have the log-probability of every generated token told: answers are judged by them too."""


class Question(msgspec.Struct, frozen=True):
    prompt: tuple[int, ...]
    expected: tuple[int, ...] = ()
    """The right answer, where it is known beforehand."""


class Served(msgspec.Struct, frozen=True):
    """One request. Times in seconds, as its client saw them."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    """One a token, natural logarithms; none where they were not told."""
    ttft_s: float = 0.0
    """From sending it to its first token."""
    itl_s: tuple[float, ...] = ()
    """Between tokens; those that come together share the time that they took."""
    total_s: float = 0.0
    error: str = ""
    """Why it has no answer, else empty."""
    transfer: TransferReport | None = None


class Spread(msgspec.Struct, frozen=True):
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float], scale: float = 1.0) -> "Spread | None":
        """None of no values."""
        if not values:
            return None
        return cls(*(round(float(v) * scale, 3) for v in (*np.percentile(values, (50, 90, 99)), max(values))))


class Side(msgspec.Struct, frozen=True):
    """All requests of a run that went to one server."""

    name: str
    """"divided" or "undivided"."""
    answered: int
    errors: dict[str, int]
    """How many ended so, by what was said."""
    seconds: float
    """From the first request to the last answer."""
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Spread | None
    itl_ms: Spread | None
    total_ms: Spread | None
    exposed_ms: Spread | None = None
    """From the end of prefill to the last byte of its state."""
    exposed_share: Spread | None = None
    """The same, as a share of the time that prefill took."""
    hidden: Spread | None = None
    """Share of a transfer's bytes that landed while prefill computed."""
    paths: dict[str, int] = {}
    """Transfers by what carried them."""

    @classmethod
    def of(cls, name: str, served: Sequence[Served], seconds: float) -> "Side":
        good = [one for one in served if not one.error]
        moved = [one.transfer for one in good if one.transfer is not None]
        return cls(
            name=name,
            answered=len(good),
            errors=dict(Counter(one.error for one in served if one.error)),
            seconds=round(seconds, 3),
            requests_per_s=round(len(good) / seconds, 3),
            output_tokens_per_s=round(sum(len(one.tokens) for one in good) / seconds, 2),
            ttft_ms=Spread.of([one.ttft_s for one in good], 1e3),
            itl_ms=Spread.of([gap for one in good for gap in one.itl_s], 1e3),
            total_ms=Spread.of([one.total_s for one in good], 1e3),
            exposed_ms=Spread.of([facts.exposed_s for facts in moved], 1e3),
            exposed_share=Spread.of([exposed_share(facts) for facts in moved]),
            hidden=Spread.of([facts.hidden_fraction for facts in moved]),
            paths=dict(Counter(facts.path for facts in moved)),
        )


def exposed_share(facts: TransferReport) -> float:
    """What prefill did not hide of a transfer, as a share of prefill: all between Granted and P's Done."""
    prefill_s = facts.total_s - facts.granted_s - facts.exposed_s
    return facts.exposed_s / prefill_s if prefill_s > 0 else 0.0


class Stopwatch:
    """Times one request's tokens as they come. Owned by whoever waits for them."""

    def __init__(self, sent_at: float) -> None:
        self._sent_at = self._last = sent_at
        self._ttft = 0.0
        self._gaps: list[float] = []
        self._tokens: list[int] = []
        self._logprobs: list[float] = []

    def saw(self, tokens: Sequence[int], at: float, logprobs: Sequence[float] = ()) -> None:
        if not tokens:
            return
        gap = (at - self._last) / len(tokens)
        if self._tokens:
            self._gaps += [gap] * len(tokens)
        else:
            self._ttft = at - self._sent_at
            self._gaps += [0.0] * (len(tokens) - 1)
        self._last = at
        self._tokens += tokens
        self._logprobs += logprobs

    def served(self, at: float, error: str = "", transfer: TransferReport | None = None) -> Served:
        return Served(
            tuple(self._tokens),
            tuple(self._logprobs),
            self._ttft,
            tuple(self._gaps),
            at - self._sent_at,
            error,
            transfer,
        )


def chains(load: Load) -> list[Question]:
    """Link-chasing prompts, whose answers are known, one more than the load has. Raises ``ConfigError``."""
    if load.input_tokens < link_chasing.MIN_TOKENS:
        raise ConfigError(f"--input-tokens {load.input_tokens} is less than the {link_chasing.MIN_TOKENS} of a chain")
    made = [link_chasing.make_prompt(load.seed * 100_000 + n, load.input_tokens) for n in range(load.requests + 1)]
    return [Question(prompt.token_ids, prompt.expected(load.output_tokens)) for prompt in made]


def noise(load: Load, ids: tuple[int, int] = SAFE_IDS) -> list[Question]:
    """Random prompts of token ids from the first to before the second of ``ids``; again one more."""
    draw = random.Random(load.seed)
    return [Question(tuple(draw.choices(range(*ids), k=load.input_tokens))) for _ in range(load.requests + 1)]
