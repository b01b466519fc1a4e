"""Which blocks of a transfer hold valid bytes at D: each wanted block is read once, and known when it has landed."""

import msgspec


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


class Residency:
    """Blocks ``first .. num_blocks - 1`` are wanted; posted in order, they land in any. Owned by a decode session."""

    def __init__(self, num_blocks: int, first: int = 0) -> None:
        self.num_blocks = num_blocks
        self._next = first
        self._outstanding: dict[int, BlockRange] = {}
        self._landed = first

    def take(self, complete_blocks: int) -> BlockRange | None:
        """The blocks below ``complete_blocks`` that nobody has posted yet, as one range; None if there are none."""
        stop = min(complete_blocks, self.num_blocks)
        if stop <= self._next:
            return None
        taken = BlockRange(self._next, stop)
        self._next = stop
        return taken

    def posted(self, read: int, blocks: BlockRange) -> None:
        assert read not in self._outstanding, f"read {read} posted twice"
        self._outstanding[read] = blocks

    def ended(self, read: int, *, valid: bool) -> BlockRange | None:
        """A read ended; its blocks are resident when ``valid``. None for a read that is not outstanding."""
        blocks = self._outstanding.pop(read, None)
        if blocks is not None and valid:
            self._landed += blocks.num_blocks
        return blocks

    @property
    def num_outstanding(self) -> int:
        return len(self._outstanding)

    @property
    def complete(self) -> bool:
        return self._landed == self.num_blocks and not self._outstanding
