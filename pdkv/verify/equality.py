"""When two implementations' answers count as equal, though their float32 sums differ in order."""

from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

LOGIT_TOLERANCE = 1e-4
"""Logits may differ by this much; a token may differ only where the oracle's own two best are closer than this."""

REDRAW_GAP = 1e-3
"""An oracle case with two best logits closer than this somewhere decides nothing and is drawn again."""

EXCUSED_SHARE = 1e-3
"""At most this share of all tokens (or rows of logits) may differ, near ties all of them."""

Logits = npt.NDArray[np.float32]


class Verdict(msgspec.Struct, frozen=True):
    """What a comparison found. Equal means that ``problems`` is empty; what was excused is reported all the same."""

    num_compared: int
    """Tokens, or rows of logits."""
    largest_difference: float
    """Of logits; 0.0 where only tokens were compared."""
    problems: tuple[str, ...] = ()
    excused: tuple[str, ...] = ()

    @property
    def equal(self) -> bool:
        return not self.problems


def top_gaps(logits: Logits) -> Logits:
    """Best minus second best of each row: [num_rows, vocab] to [num_rows]."""
    best = np.partition(logits, -2, axis=-1)
    return np.asarray(best[..., -1] - best[..., -2], dtype=np.float32)


def is_decisive(oracle_logits: Logits) -> bool:
    """No near tie anywhere, so the case may be used. Rows of logits: [num_rows, vocab]."""
    return bool((top_gaps(oracle_logits) >= REDRAW_GAP).all())


def compare_tokens(ours: Sequence[int], oracle: Sequence[int], oracle_logits: Logits) -> Verdict:
    """Greedy tokens against the oracle's, whose row i of logits, [num_tokens, vocab], gave its token i.

    Behind an excused difference the two speak about different texts, so the comparison ends there.
    """
    if len(ours) != len(oracle):
        return Verdict(0, 0.0, (f"{len(ours)} tokens, the oracle has {len(oracle)}",))
    for i, (mine, its) in enumerate(zip(ours, oracle, strict=True)):
        if mine == its:
            continue
        gap = float(top_gaps(oracle_logits[i]))
        text = f"token {i} is {mine}, the oracle says {its} by {gap:.2e}"
        second = int(np.argsort(oracle_logits[i])[-2])
        if gap < LOGIT_TOLERANCE and mine == second:
            return Verdict(i + 1, 0.0, excused=(text,))
        return Verdict(i + 1, 0.0, (text,))
    return Verdict(len(ours), 0.0)


def compare_logits(ours: Logits, oracle: Logits) -> Verdict:
    """Rows of logits for the same tokens, both [num_rows, vocab]. NaN is never equal.

    A row that is further off passes as excused (a near tie in the choice of blocks or experts upstream of it) as long
    as such rows keep within the excused share: none in fewer than 1,000 rows.
    """
    if ours.shape != oracle.shape:
        return Verdict(0, 0.0, (f"logits are {ours.shape}, the oracle's {oracle.shape}",))
    differences = np.abs(ours - oracle).max(axis=-1, initial=0.0)  # [num_rows]
    within = differences <= LOGIT_TOLERANCE  # false for NaN
    texts = tuple(f"logits of row {i} are off by {differences[i]:.2e}" for i in np.flatnonzero(~within))
    largest = float(differences.max(initial=0.0))
    if len(texts) > EXCUSED_SHARE * len(differences) or np.isnan(largest):
        return Verdict(len(differences), largest, texts)
    return Verdict(len(differences), largest, excused=texts)


def combine(verdicts: Sequence[Verdict]) -> Verdict:
    """One verdict over many cases; more excuses than their share become problems."""
    num_compared = sum(v.num_compared for v in verdicts)
    problems = tuple(text for v in verdicts for text in v.problems)
    excused = tuple(text for v in verdicts for text in v.excused)
    if len(excused) > max(1.0, EXCUSED_SHARE * num_compared):
        problems += (f"{len(excused)} near ties in {num_compared} comparisons are too many",)
    largest = max((v.largest_difference for v in verdicts), default=0.0)
    return Verdict(num_compared, largest, problems, excused)
