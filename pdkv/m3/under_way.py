"""Steps from their being scheduled to their end, and who decodes together: who does what when is worked out once."""

from collections.abc import Sequence as SequenceOf

import msgspec

from pdkv.m3.requests import RequestId
from pdkv.m3.run import seated, seating
from pdkv.m3.sampling import NO_TOKEN, Tokens
from pdkv.m3.sequence import Sequence, Stage, Told

_KEPT_AT_ONCE = 8
"""Full blocks of a sequence that are named and kept together, while it goes on: at once that takes little more time
than for one, on a processor that has forgotten how."""


class DecodeGroup:
    """Sequences that decode step after step, each one token a step, whoever leaves and joins meanwhile. Owned
    by the scheduler. Places are of its latest step; steps are counted from its first.

    What a step of many costs the host is work for each of them, the more so as the host's caches are cold after every
    wait for the device. So everybody is entered once in the step in which there is something to do for it, and touched
    in no other; tokens are kept as they were told, until somebody wants to know a sequence's.
    """

    def __init__(self, sequences: list[Sequence], starts: list[int], block_size: int) -> None:
        """``starts``: positions of the first step's tokens; all before them is known."""
        self.sequences = sequences
        """By place. Lists here are not changed, but replaced: a step keeps those that it was scheduled with."""
        self.ids: list[RequestId] = [sequence.request.id for sequence in sequences]
        self._origins = starts
        """Where each one's token of the first step stands, or would."""
        self._block_size = block_size
        self._beginning: dict[int, dict[Sequence, int]] = {}
        """By the step's number modulo the size of a block: who begins a block then, with its origin."""
        self._ending: dict[int, list[Sequence]] = {}
        """By the number of their last step: those that end by length."""
        self._released: list[Sequence] = []
        """Since places were last given anew."""
        self._left: tuple[int, list[int]] | None = None
        """The latest step that was asked about, and who is in no step behind it."""
        self._told: Told | None = None
        """None before there is a second step: many a group is over after one."""

    def begins_second_step(self, most: int) -> bool:
        """Whether nobody has gone on in this group yet. Then all are entered; ``most``: places of any step."""
        if self._told is not None:
            return False
        self._told = Told((_KEPT_AT_ONCE + 2) * self._block_size, most)
        for place, (sequence, origin) in enumerate(zip(self.sequences, self._origins, strict=True)):
            self._enter(sequence, place, origin, 0)
            if sequence.stage is Stage.RELEASED:
                self._released.append(sequence)
        return True

    def leaving(self, step: int) -> list[int]:
        """Places of the latest step, ``step``, whose sequences are in none behind it, ascending: released, or at their
        end by length. Those of one before it are as they were when they were asked for first."""
        if self._left is None or self._left[0] < step:
            self._left = step, self._leaving(step)
        return self._left[1]

    def _leaving(self, step: int) -> list[int]:
        if self._told is None:
            told = enumerate(zip(self.sequences, self._origins, strict=True))
            return [
                place for place, (its, origin) in told if its.stage is Stage.RELEASED or origin + 2 >= its.most_tokens
            ]
        ending = self._ending.pop(step, ())
        if not (ending or self._released):
            return []
        return sorted({sequence.place for sequence in (*ending, *self._released)})

    def release(self, sequence: Sequence) -> None:
        """It decodes no more. Harmless for one that is not in the latest step."""
        if self._told is not None and _is_at(sequence, sequence.place, self.sequences):
            self._released.append(sequence)

    def released_in(self, step: "UnderWay") -> list[int]:
        """Places in a step that is not the latest of those that were released since it was scheduled."""
        if not self._released:
            return []
        places = ((its, its.place_in(step.step)) for its in self._released)
        return [place for its, place in places if _is_at(its, place, step.sequences)]

    def change(self, step: int, left: SequenceOf[int], joined: SequenceOf[Sequence]) -> None:
        """Give places anew, as from ``step`` on: it is the latest now."""
        assert self._told is not None, "a second step has begun"
        for place in left:
            sequence, origin = self.sequences[place], self._origins[place]
            del self._beginning[-origin % self._block_size][sequence]
            last = self._ending.get(sequence.most_tokens - origin - 2, [])
            if sequence in last:
                last.remove(sequence)
        seats = seating(len(self.sequences), left, len(joined))
        origins = [len(sequence.tokens) - 1 - step for sequence in joined]
        self.sequences = seated(self.sequences, seats, joined)
        self.ids = seated(self.ids, seats, [sequence.request.id for sequence in joined])
        self._origins = seated(self._origins, seats, origins)
        for sequence, place, origin in zip(joined, seats.joined, origins, strict=True):
            self._enter(sequence, place, origin, step)
        for to, _ in seats.moved:
            self.sequences[to].move(to, step)
        if self._released:
            self._released = [its for its in self._released if _is_at(its, its.place, self.sequences)]

    def _enter(self, sequence: Sequence, place: int, origin: int, step: int) -> None:
        assert self._told is not None
        sequence.follow(self._told, place, step)
        self._beginning.setdefault(-origin % self._block_size, {})[sequence] = origin
        self._ending.setdefault(sequence.most_tokens - origin - 2, []).append(sequence)

    def beginning(self, step: int) -> list[tuple[Sequence, int]]:
        """Whose token of that step is the first of a block, and the block's number."""
        found = self._beginning.get(step % self._block_size)
        return [(its, (origin + step) // self._block_size) for its, origin in found.items()] if found else []

    @staticmethod
    def to_keep(beginning: SequenceOf[tuple[Sequence, int]]) -> list[Sequence]:
        """Of those, whose full blocks are so many that they are to be kept when that step has ended."""
        return [its for its, block in beginning if block - its.num_kept >= _KEPT_AT_ONCE]

    def tell(self, tokens: Tokens) -> None:
        """What the next of its steps that end has chosen: int64 [places]. Those that have ended took their own."""
        if self._told is not None:
            self._told.add(tokens)
            return
        for sequence, token in zip(self.sequences, tokens.tolist(), strict=True):
            if token != NO_TOKEN and sequence.stage is not Stage.RELEASED:
                sequence.tokens.append(token)


class UnderWay(msgspec.Struct, frozen=True, gc=False):
    """One step."""

    sequences: list[Sequence]
    """By run. An id may be another request's by the time the step ends; this is whose run it was."""
    group: DecodeGroup | None
    """Whose step it is, if it only decodes, one token of each: the device can go on alone."""
    step: int = 0
    """Its number in the group."""
    ids: list[RequestId] = []
    """By run, of a group's step."""
    to_keep: SequenceOf[Sequence] = ()
    """Of a group's step: whose full blocks are to be kept when it ends."""

    def has(self, sequence: Sequence) -> bool:
        if self.group is None or self.step == 0:
            return sequence in self.sequences
        return _is_at(sequence, sequence.place_in(self.step), self.sequences)


def _is_at(sequence: Sequence, place: int, sequences: SequenceOf[Sequence]) -> bool:
    return place < len(sequences) and sequences[place] is sequence
