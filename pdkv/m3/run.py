"""What one step computes of one request, as plain numbers: small enough to be sent to every rank."""

from collections.abc import Sequence
from typing import TypeVar

import msgspec

from pdkv.m3.requests import RequestId
from pdkv.m3.sampling import SamplingParams

_T = TypeVar("_T")

NOT_FINITE = "the model's output is not finite: the checkpoint, or the state that the request attends to, is damaged"


PENDING = -1
"""In the place of a token that the step in flight chooses: it is on the device, and nobody here has read it."""


class TokenBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of the model."""

    block_size: int
    vocab_size: int
    eos_tokens: frozenset[int]


class Run(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Part of one step: compute ``tokens`` of one request at positions ``start``, ``start + 1``, ..."""

    id: RequestId
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    """Pages of the blocks up to and with the last of ``tokens``, at least; those behind hold nothing of it yet."""
    sampling: SamplingParams | None
    """How to choose the token after the last one; ``None`` when none is wanted yet."""
    num_drafts: int = 0
    """So many of ``tokens``, the last ones, are proposals: a token is also chosen in the place of each."""
    num_top: int = 0
    """Likeliest tokens to tell with each chosen one."""
    targets: tuple[int, ...] = ()
    """Prompt tokens to score: they follow the first ``len(targets)`` of ``tokens``."""
    prompt_top: int = 0
    """Likeliest tokens to tell with each of ``targets``."""
    behind: int | None = None
    """Its only token is what this run, by its place, of the step in flight chooses; ``tokens`` says ``PENDING``."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def num_choices(self) -> int:
        """Tokens to choose: one after each draft, and one before the first."""
        return 1 + self.num_drafts if self.sampling is not None else 0

    @property
    def wanted_rows(self) -> tuple[int, ...]:
        """Which of ``tokens`` the model's output is wanted for: those to score, then those to choose a token after."""
        last = len(self.tokens)
        return (*range(len(self.targets)), *range(last - self.num_choices, last))


class Onward(msgspec.Struct, frozen=True):
    """The runs of the step in flight once more, each one token further: its only token is what that step chooses.

    What a step of many sequences costs the host is work for each of them, so the commonest step says nothing of most.
    """

    left: tuple[int, ...] = ()
    """Places in that step, ascending, of those that have come to their end: they have no run any more."""
    joined: tuple[Run, ...] = ()
    """Behind all that stay. Their tokens are known, one each."""


def staying(entries: Sequence[_T], left: Sequence[int]) -> list[_T]:
    """All entries but those at the places ``left``, which ascend."""
    stay = list(entries)
    for place in reversed(left):
        del stay[place]
    return stay


Step = list[Run] | Onward
"""What is computed at once. An empty list is no step."""
