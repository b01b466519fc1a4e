"""Whether served answers are what the model says, up to rounding, which is measured in the same run.

Products of other shapes add up in another order, and the shapes of a step hang on who else is in it. So where two
tokens are nearly alike another batch may choose the other one, and from there on its text is another: that answers
differ decides nothing. What is judged is each token behind the answer's own text: one engine computes prompt and answer
at once, by itself, and says how likely each token is there and how likely the best one.
"""

from collections.abc import Sequence
from statistics import median

import msgspec

from pdkv.verify.equality import LOGIT_TOLERANCE


class Answer(msgspec.Struct, frozen=True):
    """As it was given. The entries of ``logprobs``, where they were told, are natural logarithms."""

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...] = ()


class Scored(msgspec.Struct, frozen=True):
    """What the judge says of an answer's tokens, one entry each: the log-probability of the token, and the best two."""

    own: tuple[float, ...]
    best: tuple[float, ...]
    second: tuple[float, ...]
    best_ids: tuple[int, ...]


class Rounding(msgspec.Struct, frozen=True):
    """By how much one token's log-probability differs between two ways to compute it: alone and token by token, and
    all of an answer at once behind a prompt in other chunks."""

    tokens: int
    p50: float
    max: float
    margin: float
    """What two tokens may differ by and yet change places: both may be off by the most that was seen. No less than one
    unit in the last place of what weights and state are held in: a rounding that goes the other way is rare, and may
    have been seen nowhere."""
    gap: float
    """Median distance of the best two tokens: what a difference of another cause would be beside."""

    @property
    def decides(self) -> bool:
        """Most wrong choices would be seen."""
        return self.margin < self.gap


class Judged(msgspec.Struct, frozen=True):
    """Of one side's answers, each of which is equal to what the engine says alone, a near tie, or wrong."""

    side: str
    compared: int
    equal: int
    behind: float
    """The most by which a token falls short of the best in its place."""
    deviation: float
    """The most by which a told log-probability is off; 0 where none were told."""
    near_ties: tuple[str, ...]
    wrong: tuple[str, ...]


def rounding_of(answers: Sequence[Answer], scored: Sequence[Scored], least: float = LOGIT_TOLERANCE) -> Rounding:
    """``answers`` with their log-probabilities, as one engine gave them that had nothing else to do; ``least``: what
    the margin is at least, relative to 1."""
    seen = sorted(
        abs(told - own)
        for answer, its in zip(answers, scored, strict=True)
        for told, own in zip(answer.logprobs, its.own, strict=True)
    )
    gap = median(a - b for its in scored for a, b in zip(its.best, its.second, strict=True))
    return Rounding(len(seen), median(seen), seen[-1], max(least, 2 * seen[-1]), gap)


def judge(
    side: str, answers: dict[int, Answer], alone: Sequence[Answer], scored: dict[int, Scored], margin: float
) -> Judged:
    """``answers`` of one side by their question's number, and what the judge says of them; ``alone``: of all questions.

    A token is wrong that is further behind the best than ``margin``, and so is a log-probability that is further off.
    """
    near_ties, wrong = [], []
    behind = deviation = 0.0
    for number, answer in answers.items():
        its = scored[number]
        short = [best - own for best, own in zip(its.best, its.own, strict=True)]
        off = [abs(told - own) for told, own in zip(answer.logprobs, its.own, strict=bool(answer.logprobs))]
        behind, deviation = max(behind, *short), max(deviation, *off, 0.0)
        at = next((i for i, much in enumerate(short) if not much <= margin), None)
        if at is not None:
            wrong.append(
                f"{side}, request {number}, token {at}: {answer.tokens[at]} is {short[at]:.3g} behind "
                f"{its.best_ids[at]}; rounding explains {margin:.3g}"
            )
            continue
        at = next((i for i, much in enumerate(off) if not much <= margin), None)
        if at is not None:
            wrong.append(
                f"{side}, request {number}, token {at}: {answer.tokens[at]} is told with log-probability "
                f"{answer.logprobs[at]:.5g} and has {its.own[at]:.5g}; rounding explains {margin:.3g}"
            )
        elif answer.tokens != alone[number].tokens:
            near_ties.append(_near_tie(side, number, answer.tokens, alone[number].tokens, max(short)))
    equal = len(answers) - len(near_ties) - len(wrong)
    return Judged(side, len(answers), equal, behind, deviation, tuple(near_ties), tuple(wrong))


def _near_tie(side: str, number: int, tokens: Sequence[int], alone: Sequence[int], short: float) -> str:
    at = next((i for i, (a, b) in enumerate(zip(tokens, alone, strict=False)) if a != b), min(len(tokens), len(alone)))
    given, other = ((str(some[at]) if at < len(some) else "nothing") for some in (tokens, alone))
    return f"{side}, request {number}, token {at}: {given}, alone {other}; no token is more than {short:.3g} behind"
