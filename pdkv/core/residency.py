"""Which blocks of a transfer hold valid bytes at D: each wanted part is read once, and known when it has landed."""

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise

import msgspec

from pdkv.schema import ALL_LAYERS, LayerRange


class BlockRange(msgspec.Struct, frozen=True):
    """Blocks ``[start, stop)`` of the sequence."""

    start: int
    stop: int

    @property
    def num_blocks(self) -> int:
        return self.stop - self.start


class WantedBlocks(msgspec.Struct, frozen=True):
    """What of a prompt D wants from P: all blocks from ``first`` on. Those before it are in D's own pages already."""

    num_tokens: int
    block_size: int
    first: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.first < self.num_blocks:
            raise ValueError(f"first wanted block {self.first} is not one of {self.num_blocks}")

    @property
    def num_blocks(self) -> int:
        return -(-self.num_tokens // self.block_size)

    def complete(self, tokens: int) -> int:
        """Leading blocks that nobody writes to any more once ``tokens`` are computed: the last one of the prompt, too,
        when it is all."""
        return self.num_blocks if tokens >= self.num_tokens else tokens // self.block_size


class Part(msgspec.Struct, frozen=True):
    """Something to read at once: so many blocks of so many layers."""

    blocks: BlockRange
    layers: LayerRange = ALL_LAYERS
    num_groups: int = 1
    """Layer groups in ``layers``."""

    @property
    def size(self) -> int:
        """In units of one block of one layer group."""
        return self.blocks.num_blocks * self.num_groups


class Residency:
    """Blocks ``first .. num_blocks - 1`` are wanted, of every layer group; taken in order, they land in any.

    Owned by a decode session. ``group_starts``: the first layer of each group, ascending from 0.
    """

    def __init__(self, num_blocks: int, first: int = 0, group_starts: Sequence[int] = (0,)) -> None:
        assert group_starts[0] == 0, "the first group begins with the first layer"
        self.num_blocks = num_blocks
        self._starts = tuple(group_starts)
        self._next = [first] * len(self._starts)
        self._outstanding: dict[int, Part] = {}
        self._missing = (num_blocks - first) * len(self._starts)

    def take(self, complete_blocks: Sequence[int]) -> list[Part]:
        """What nobody has taken yet of the leading ``complete_blocks`` of each layer group.

        In as few parts as can be, and whole rows wherever all groups of a block are wanted: a row is one span.
        """
        stops = [max(now, min(stop, self.num_blocks)) for now, stop in zip(self._next, complete_blocks, strict=True)]
        parts: list[Part] = []
        for first, blocks in self._rectangles(stops):
            end = first[-1] + 1
            stop = self._starts[end] if end < len(self._starts) else None
            parts.append(Part(blocks, LayerRange(self._starts[first[0]], stop), len(first)))
        self._next = stops
        return parts

    def posted(self, read: int, part: Part) -> None:
        assert read not in self._outstanding, f"read {read} posted twice"
        self._outstanding[read] = part

    def ended(self, read: int, *, valid: bool) -> Part | None:
        """A read ended; its part is resident when ``valid``. None for a read that is not outstanding."""
        part = self._outstanding.pop(read, None)
        if part is not None and valid:
            self._missing -= part.size
        return part

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def complete(self) -> bool:
        return self._missing == 0 and not self._outstanding

    def _rectangles(self, stops: Sequence[int]) -> Iterator[tuple[tuple[int, ...], BlockRange]]:
        """Neighbouring groups with blocks that all of them want, blocks in order."""
        edges = sorted({*self._next, *stops})
        wanted = [(self._runs(start, stop, stops), BlockRange(start, stop)) for start, stop in pairwise(edges)]
        for runs, ranges in groupby(wanted, key=lambda entry: entry[0]):
            blocks = [block for _, block in ranges]
            for run in runs:
                yield run, BlockRange(blocks[0].start, blocks[-1].stop)

    def _runs(self, start: int, stop: int, stops: Sequence[int]) -> tuple[tuple[int, ...], ...]:
        """Groups that want the blocks from ``start`` to ``stop``, in runs of neighbours."""
        found: list[list[int]] = []
        for group, (taken, end) in enumerate(zip(self._next, stops, strict=True)):
            if taken <= start and stop <= end:
                if found and found[-1][-1] == group - 1:
                    found[-1].append(group)
                else:
                    found.append([group])
        return tuple(map(tuple, found))
