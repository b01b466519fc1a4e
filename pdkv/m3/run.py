"""What one step computes of one request, as plain numbers: small enough to be sent to every rank."""

from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from pdkv.m3.requests import RequestId
from pdkv.m3.sampling import SamplingParams

_T = TypeVar("_T")

NOT_FINITE = "the model's output is not finite: the checkpoint, or the state that the request attends to, is damaged"


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
    Whoever stays keeps its place, but for the last of them where others have left gaps (``seating``).
    """

    left: tuple[int, ...] = ()
    """Places in that step, ascending, of those that have come to their end: they have no run any more."""
    joined: tuple[Run, ...] = ()
    """Their tokens are known, one each."""


class Seating(NamedTuple):
    """Who has which place in a step, of which some are others' than in the step before."""

    num_places: int
    joined: list[int]
    """Place of each that joins, in order: first of those that have left, then behind all."""
    moved: list[tuple[int, int]]
    """Places that whoever was last has now: to, from. Gaps that nobody joins in are filled so."""


def seating(count: int, left: Sequence[int], num_joined: int) -> Seating:
    """Of a step behind one of ``count`` places, of which ``left`` become free, in ascending order."""
    after = count - len(left) + num_joined
    if num_joined >= len(left):
        return Seating(after, [*left, *range(count, after)], [])
    gaps = [place for place in left[num_joined:] if place < after]
    gone = set(left)
    last = [place for place in range(after, count) if place not in gone]
    return Seating(after, list(left[:num_joined]), list(zip(gaps, last, strict=True)))


def seated(entries: Sequence[_T], seats: Seating, joined: Sequence[_T]) -> list[_T]:
    """Entries by place as ``seats`` has them; a new list."""
    now = [*entries, *joined[len(joined) - max(0, seats.num_places - len(entries)) :]]
    for place, entry in zip(seats.joined, joined, strict=True):
        now[place] = entry
    for to, source in seats.moved:
        now[to] = now[source]
    del now[seats.num_places :]
    return now


Step = list[Run] | Onward
"""What is computed at once. An empty list is no step."""
