"""Steps from their being scheduled to their end, and who decodes together: who does what when is worked out once."""

from collections.abc import Sequence as SequenceOf

import msgspec
import numpy as np

from pdkv.m3.requests import RequestId
from pdkv.m3.run import staying
from pdkv.m3.sampling import GreedyChoices
from pdkv.m3.sequence import Sequence, Stage

Positions = np.ndarray[tuple[int], np.dtype[np.int64]]
_MOST_TOLD = 128
"""Steps after which every sequence takes what was told of it."""


class DecodeGroup:
    """Sequences that decode step after step, each one token a step, greedily, until one leaves or another joins. Owned
    by the scheduler. Entry i of everything is of the i-th; steps are counted from the group's first.

    What a step of many costs the host is work for each of them, the more so as the host's caches are cold after every
    wait for the device. So a step asks here for those that have something to do in it, and touches no other; its tokens
    are kept as they were told, until somebody wants to know a sequence's.
    """

    def __init__(self, sequences: list[Sequence], starts: Positions, num_changes: int, block_size: int) -> None:
        """``starts``: positions of the first step's tokens; all before them is known.

        ``num_changes``: how often anybody had begun or ended to decode; while that stays, all are held."""
        self.sequences = sequences
        self.ids: tuple[RequestId, ...] = tuple([sequence.request.id for sequence in sequences])
        self.num_changes = num_changes
        self._starts = starts
        self._most: Positions = np.array([sequence.most_tokens for sequence in sequences], dtype=np.int64)
        self._num_whole = int((self._most - starts).min()) - 2
        """Steps whose choice is nobody's last by length."""
        self._block_size = block_size
        self._beginning: dict[int, list[int]] = {}
        """Places that begin a block in a step, by the step's number modulo the size of a block. Not looked up
        before there are many steps."""
        self._told: list[list[int]] | None = None
        """Of the latest steps; None before there was any."""

    def without(
        self, left: SequenceOf[int], joined: SequenceOf[Sequence], step: int, num_changes: int
    ) -> "DecodeGroup":
        """That of which ``step`` is the first: of those that are not at the places ``left``, and of ``joined``."""
        stay = np.ones(len(self.sequences), dtype=bool)
        stay[left] = False
        starts = np.append(self._starts[stay] + step, [len(sequence.tokens) - 1 for sequence in joined])
        sequences = [*staying(self.sequences, left), *joined]
        return DecodeGroup(sequences, starts.astype(np.int64), num_changes, self._block_size)

    def position(self, place: int, step: int) -> int:
        """Where its token of that step stands."""
        return int(self._starts[place]) + step

    def places_beginning(self, step: int) -> SequenceOf[int]:
        """Places whose token of that step is the first of a block."""
        size = self._block_size
        if step < 2:
            places: list[int] = ((self._starts + step) % size == 0).nonzero()[0].tolist()
            return places
        if not self._beginning:
            for place, first in enumerate((-self._starts % size).tolist()):
                self._beginning.setdefault(first, []).append(place)
        return self._beginning.get(step % size, ())

    def places_ending(self, step: int, num_changes: int) -> list[int]:
        """Places whose sequences are in no step behind that one: released, or at their end by length."""
        ending: list[int] = []
        if step >= self._num_whole:
            ending = (self._starts + step + 2 >= self._most).nonzero()[0].tolist()
        if num_changes != self.num_changes:
            gone = (place for place, sequence in enumerate(self.sequences) if sequence.stage is Stage.RELEASED)
            ending = sorted({*ending, *gone})
        return ending

    def tell(self, tokens: list[int]) -> None:
        """What the next of its steps that end has chosen. Steps end in order, so the group before this has no more."""
        if self._told is None:  # many a group is over after a step
            self._told = []
            for sequence, token in zip(self.sequences, tokens, strict=True):
                sequence.tokens.append(token)
            return
        if len(self._told) in (0, _MOST_TOLD):
            self._told = []
            for place, sequence in enumerate(self.sequences):
                sequence.follow(self._told, place)
        self._told.append(tokens)


class UnderWay(msgspec.Struct, frozen=True, gc=False):
    """One step."""

    sequences: list[Sequence]
    """By run. An id may be another request's by the time the step ends; this is whose run it was."""
    group: DecodeGroup | None
    """Whose step it is, if it only decodes, one token of each, greedily, and tells no more than the token: the device
    can go on alone."""
    step: int = 0
    """Its number in the group."""

    def places_of_note(self, choices: GreedyChoices, eos_tokens: frozenset[int], num_changes: int) -> list[int]:
        """Places whose choice is more than one token of a request that goes on: the last, or nobody's, or none."""
        assert self.group is not None, "steps of other kinds are looked at run by run"
        places = self.group.places_ending(self.step, num_changes)
        if not choices.damaged and eos_tokens.isdisjoint(choices.tokens):
            return places
        told = zip(choices.tokens, self.sequences, strict=True)
        ends = (place for place, (token, its) in enumerate(told) if token in eos_tokens and not its.ignores_eos)
        return sorted({*places, *choices.damaged, *ends})
