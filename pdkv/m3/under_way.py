"""A step from its being scheduled to its end, as arrays: who runs where, and whose end is known."""

from collections.abc import Sequence as SequenceOf
from typing import NamedTuple

import numpy as np

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run, staying
from pdkv.m3.sampling import GreedyChoices
from pdkv.m3.sequence import Sequence, Stage

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
_NOWHERE: Positions = np.zeros(0, dtype=np.int64)


class UnderWay(NamedTuple):
    """Entry i of everything is of the step's run i."""

    sequences: list[Sequence]
    """An id may be another request's by the time the step ends; this is whose run it was."""
    is_plain: bool
    """It only decodes, one token of each, greedily, and tells no more than the token: the device can go on alone. Of
    other steps nothing below is known."""
    num_changes: int
    """How often anybody had begun or ended to decode when it was scheduled: while that stays, all are held."""
    ids: tuple[RequestId, ...] = ()
    starts: Positions = _NOWHERE
    """Positions of the runs' only tokens: all before them, and they, are ``start + 1``; the step chooses one more."""
    most: Positions = _NOWHERE
    """Tokens with which each ends at the latest."""
    num_left: int = 0
    """Steps behind this one which nobody of it will have left by length."""

    @classmethod
    def plain(cls, sequences: list[Sequence], starts: Positions, num_changes: int) -> "UnderWay":
        most = np.array([sequence.most_tokens for sequence in sequences], dtype=np.int64)
        ids = tuple([sequence.request.id for sequence in sequences])
        return cls(sequences, True, num_changes, ids, starts, most, _num_left(starts, most))

    def once_more(self) -> "UnderWay":
        """The step behind, of the same sequences."""
        return UnderWay(self.sequences, True, self.num_changes, self.ids, self.starts + 1, self.most, self.num_left - 1)

    def without(self, left: SequenceOf[int], joined: SequenceOf[Sequence], num_changes: int) -> "UnderWay":
        """The step behind, of those that are not at the places ``left``, and of ``joined``."""
        stay = np.ones(len(self.sequences), dtype=bool)
        stay[left] = False
        starts, most, ids = self.starts[stay] + 1, self.most[stay], staying(self.ids, left)
        if joined:
            starts = np.append(starts, [len(sequence.tokens) - 1 for sequence in joined])
            most = np.append(most, [sequence.most_tokens for sequence in joined])
            ids += [sequence.request.id for sequence in joined]
        sequences = [*staying(self.sequences, left), *joined]
        return UnderWay(sequences, True, num_changes, tuple(ids), starts, most, _num_left(starts, most))

    def places_ending(self, num_changes: int) -> list[int]:
        """Places whose sequences are in no step behind this one: released, or at their end by length."""
        ending: list[int] = [] if self.num_left else (self.starts + 2 >= self.most).nonzero()[0].tolist()
        if num_changes != self.num_changes:
            gone = (place for place, sequence in enumerate(self.sequences) if sequence.stage is Stage.RELEASED)
            ending = sorted({*ending, *gone})
        return ending

    def places_of_note(self, choices: GreedyChoices, eos_tokens: frozenset[int], num_changes: int) -> list[int]:
        """Places whose choice is more than one token of a request that goes on: the last, or nobody's, or none."""
        places = self.places_ending(num_changes)
        if not choices.damaged and eos_tokens.isdisjoint(choices.tokens):
            return places
        told = zip(choices.tokens, self.sequences, strict=True)
        ends = (place for place, (token, its) in enumerate(told) if token in eos_tokens and not its.ignores_eos)
        return sorted({*places, *choices.damaged, *ends})

    def places_at(self, offset: int, block_size: int) -> list[int]:
        """Places where ``start + offset`` is a block's beginning."""
        places: list[int] = ((self.starts + offset) % block_size == 0).nonzero()[0].tolist()
        return places


def _num_left(starts: Positions, most: Positions) -> int:
    return int((most - starts).min()) - 2 if starts.size else 0


def first_starts(runs: SequenceOf[Run]) -> Positions:
    return np.array([run.start for run in runs], dtype=np.int64)
