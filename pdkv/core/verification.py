"""Digests of one transfer's pages: what P still has to compute and send, what D has found equal to it."""

from collections import deque

from pdkv.core.residency import BlockRange, Part, WantedBlocks
from pdkv.wire.messages import Digests


class OwedDigests:
    """P's half: every block that D reads is digested once, and told in messages that leave one after another, each
    when the one before was acknowledged. Owned by a prefill session."""

    def __init__(self, wanted: WantedBlocks) -> None:
        self._wanted = wanted
        self._next = wanted.first
        self._waiting: deque[Digests] = deque()

    def take(self, tokens: int) -> BlockRange | None:
        """Blocks to digest now that ``tokens`` of the prompt are complete in all layers; None when there are none."""
        stop = self._wanted.complete(tokens)
        if stop <= self._next:
            return None
        blocks = BlockRange(self._next, stop)
        self._next = stop
        return blocks

    def put(self, digests: Digests) -> None:
        """To be sent when its turn comes."""
        self._waiting.append(digests)

    def next(self) -> Digests | None:
        """The next to send; asked when no other is on its way."""
        return self._waiting.popleft() if self._waiting else None


class Verification:
    """D's half: a block is compared when it has landed in all layer groups and P's digests of it are here, and counts
    when all of them were equal. Owned by a decode session."""

    def __init__(self, wanted: WantedBlocks) -> None:
        self._first = wanted.first
        self._unverified = wanted.num_blocks - wanted.first
        self._landed = [0] * wanted.num_blocks
        """Layer groups of each block."""
        self._num_groups: int | None = None
        """None until P has granted."""
        self._told: dict[int, Digests] = {}
        """By first block; those that wait for their blocks."""
        self._known: set[int] = set()
        """Blocks that digests have come of."""

    def granted(self, num_groups: int) -> None:
        """P's pages are known, and in how many layer groups they are read."""
        self._num_groups = num_groups

    def told(self, digests: Digests) -> str:
        """Digests have come, maybe again. Returns what is wrong with them; empty when nothing is."""
        blocks = range(digests.start, digests.stop)
        if not blocks or blocks.start < self._first or blocks.stop > len(self._landed):
            wanted = f"{self._first} to {len(self._landed) - 1}"
            return f"prefill sent digests of blocks {digests.start} to {digests.stop - 1}, wanted are {wanted}"
        if self._known.isdisjoint(blocks):
            self._known.update(blocks)
            self._told[digests.start] = digests
            return ""
        return "" if self._known.issuperset(blocks) else "prefill sent digests of a block twice, in two messages"

    def landed(self, part: Part) -> None:
        """A read has ended well."""
        for block in range(part.blocks.start, part.blocks.stop):
            self._landed[block] += part.num_groups

    def take(self) -> list[Digests]:
        """Digests to compare now, each once."""
        ready = [digests for digests in self._told.values() if self._all_landed(digests)]
        for digests in ready:
            del self._told[digests.start]
        return ready

    def equal(self, blocks: BlockRange) -> None:
        """Every digest of these blocks was equal."""
        self._unverified -= blocks.num_blocks

    @property
    def complete(self) -> bool:
        return self._unverified == 0

    def _all_landed(self, digests: Digests) -> bool:
        return all(self._landed[block] == self._num_groups for block in range(digests.start, digests.stop))
