"""Whether served answers are what the model says, bit for bit or up to rounding, which is measured in the same run.

Kernels divide their work by the batch and so round by it. Where two tokens are nearly alike another batch may choose
the other one, and from there on its text is another: that answers differ decides nothing. Two things decide. Steps that
are batch-invariant give every request the bits that it has alone. Of others each token is judged behind the answer's
own text: one engine computes prompt and answer at once, by itself, and says how likely each token is there and how
likely the best one.
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
    """What the judge says of an answer's tokens, one entry each: log-probability of the token, and of the best one."""

    own: tuple[float, ...]
    best: tuple[float, ...]
    best_ids: tuple[int, ...]

    def off(self, answer: Answer) -> list[float]:
        """By how much each log-probability that was told with the answer is off; nothing where none was."""
        return [abs(told - own) for told, own in zip(answer.logprobs, self.own, strict=bool(answer.logprobs))]


class Rounding(msgspec.Struct, frozen=True):
    """By how much a token's log-probability differs between two ways in which one engine computes it: alone and token
    by token, and all of an answer at once behind a prompt in other chunks.

    Most tokens hardly differ. A few do by much: where rounding sends one to another expert, or to other blocks.
    """

    tokens: int
    p50: float
    max: float
    token_margin: float
    """What a single token may be off by: both that are compared by the most that was seen."""
    answer_margin: float
    """What half of an answer's tokens may be off by: twice the most that any answer's median was."""
    damage: float
    """The same median where one page of the prompt is another prompt's, of answers in the median: damaged state."""

    @property
    def decides(self) -> bool:
        """Answers from damaged state would be seen, most of them."""
        return self.answer_margin < self.damage


class Judged(msgspec.Struct, frozen=True):
    """Of one side's answers, each of which is equal to what the engine says alone, a near tie, or wrong."""

    side: str
    compared: int
    equal: int
    behind: float
    """The most by which a token falls short of the best in its place; 0 where the bits were compared."""
    deviation: float
    """The most by which a told log-probability is off; 0 where none were told."""
    typical_deviation: float
    """The same, of the answer whose median is the largest."""
    near_ties: tuple[str, ...]
    wrong: tuple[str, ...]


def rounding_of(
    answers: Sequence[Answer],
    scored: Sequence[Scored],
    damaged: Sequence[Scored],
    last_place: float = LOGIT_TOLERANCE,
) -> Rounding:
    """``answers`` with their log-probabilities, as one engine gave them that had nothing else to do; ``damaged``: of
    the first of them, behind prompts one page of which is another's.

    ``last_place``: a unit in the last place of 1 in what the model is held in. No margin is below one of a number as
    large as the log-probabilities are: a rounding that goes the other way may have been seen nowhere.
    """
    each = [its.off(answer) for answer, its in zip(answers, scored, strict=True)]
    seen = sorted(much for some in each for much in some)
    least = last_place * max(1.0, median(abs(own) for its in scored for own in its.own))
    return Rounding(
        tokens=len(seen),
        p50=median(seen),
        max=seen[-1],
        token_margin=max(least, 2 * seen[-1]),
        answer_margin=max(least, 2 * max(median(some) for some in each)),
        damage=median(median(its.off(answer)) for answer, its in zip(answers, damaged, strict=False)),
    )


def judge(
    side: str, answers: dict[int, Answer], alone: Sequence[Answer], scored: dict[int, Scored], rounding: Rounding
) -> Judged:
    """``answers`` of one side by their question's number, and what the judge says of them; ``alone``: of all questions.

    Wrong is a token that is further behind the best than rounding explains, a log-probability that is further off, and
    an answer most of whose log-probabilities are.
    """
    near_ties, wrong = [], []
    behind, offs = [0.0], [[0.0]]
    for number, answer in answers.items():
        its = scored[number]
        short = [best - own for best, own in zip(its.best, its.own, strict=True)]
        off = its.off(answer)
        behind += short
        offs += [off] if off else []
        problem = _problem(answer, its, short, off, rounding)
        if problem:
            wrong.append(f"{side}, request {number}, {problem}")
        elif answer.tokens != alone[number].tokens:
            difference = _difference(answer.tokens, alone[number].tokens)
            near_ties.append(f"{side}, request {number}, {difference}; no token is more than {max(short):.3g} behind")
    equal = len(answers) - len(near_ties) - len(wrong)
    most, typical = max(map(max, offs)), max(map(median, offs))
    return Judged(side, len(answers), equal, max(behind), most, typical, tuple(near_ties), tuple(wrong))


def judge_bits(side: str, answers: dict[int, Answer], alone: Sequence[Answer]) -> Judged:
    """The same where no answer may differ from ``alone`` in a token, or in a bit of a log-probability that was told."""
    wrong = []
    offs = [[0.0]]
    for number, answer in answers.items():
        its = alone[number]
        if answer.tokens != its.tokens:
            wrong.append(f"{side}, request {number}, {_difference(answer.tokens, its.tokens)}")
            continue
        off = [abs(a - b) for a, b in zip(answer.logprobs, its.logprobs, strict=bool(answer.logprobs))]
        offs += [off] if off else []
        at = next((i for i, much in enumerate(off) if much != 0), None)
        if at is not None:
            told = f"{answer.tokens[at]} is told with log-probability {answer.logprobs[at]!r}"
            wrong.append(f"{side}, request {number}, token {at}: {told}, alone {its.logprobs[at]!r}")
    most, typical = max(map(max, offs)), max(map(median, offs))
    return Judged(side, len(answers), len(answers) - len(wrong), 0.0, most, typical, (), tuple(wrong))


def _problem(answer: Answer, scored: Scored, short: Sequence[float], off: Sequence[float], rounding: Rounding) -> str:
    """What rounding does not explain, or the empty string. NaN is explained by nothing."""
    limit = rounding.token_margin
    at = next((i for i, much in enumerate(short) if not much <= limit), None)
    if at is not None:
        what = f"{answer.tokens[at]} is {short[at]:.3g} behind {scored.best_ids[at]}"
        return f"token {at}: {what}; rounding explains {limit:.3g}"
    at = next((i for i, much in enumerate(off) if not much <= limit), None)
    if at is not None:
        told = f"is told with log-probability {answer.logprobs[at]:.5g} and has {scored.own[at]:.5g}"
        return f"token {at}: {answer.tokens[at]} {told}; rounding explains {limit:.3g}"
    if off and not median(off) <= rounding.answer_margin:
        told = f"half of its log-probabilities are off by {median(off):.3g} or more"
        return f"{told}; rounding explains {rounding.answer_margin:.3g}"
    return ""


def _difference(tokens: Sequence[int], alone: Sequence[int]) -> str:
    """Of two answers that are not equal."""
    at = next((i for i, (a, b) in enumerate(zip(tokens, alone, strict=False)) if a != b), min(len(tokens), len(alone)))
    given, other = ((str(some[at]) if at < len(some) else "nothing") for some in (tokens, alone))
    return f"token {at}: {given}, alone {other}"
