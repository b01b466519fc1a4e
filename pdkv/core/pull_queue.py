"""How fast D reads: a limit in bytes a second, and the queue in which reads wait for it. The caller brings the time."""

from collections import deque
from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

import msgspec

from pdkv.core.events import Read
from pdkv.core.residency import BlockRange

Owner = TypeVar("Owner", bound=Hashable)

_SLICE_S = 0.005
"""A slice is what the limit allows in so long, and at least one page: short enough that decode and others get their
turn, long enough for a thread that comes round every few milliseconds."""


class PullRate:
    """A token bucket over bytes. What is taken may overdraw it once; then nothing may be until it is paid back.

    In any time ``t`` at most ``bytes_per_s * (t + 5 ms)`` and one slice more are taken. Owned by its queue.
    """

    def __init__(self, bytes_per_s: float) -> None:
        assert bytes_per_s > 0, "no limit is no bucket"
        self.bytes_per_s = bytes_per_s
        self.ready_at = 0.0
        """When something may be taken next."""

    @property
    def slice_bytes(self) -> int:
        return max(1, int(self.bytes_per_s * _SLICE_S))

    def take(self, num_bytes: int, now: float) -> None:
        """Only from ``ready_at`` on. Time in which nobody took anything counts for a slice and no more."""
        assert now >= self.ready_at, "taken before it was ready"
        self.ready_at = max(self.ready_at, now - _SLICE_S) + num_bytes / self.bytes_per_s


class Slice(msgspec.Struct, frozen=True):
    """Some blocks of a read, to be posted now."""

    read: Read
    """With these blocks and their pages alone; its number is that of the whole."""
    is_last: bool
    """No more of that read waits."""


class _Waiting:
    """A read of which a part is still to be posted."""

    def __init__(self, read: Read, bytes_per_block: int, blocks_at_once: int) -> None:
        self.read = read
        self.bytes_per_block = bytes_per_block
        self._blocks_at_once = blocks_at_once
        self._next = read.blocks.start

    def cut(self) -> Slice:
        whole = self.read.blocks
        blocks = BlockRange(self._next, min(self._next + self._blocks_at_once, whole.stop))
        self._next = blocks.stop
        pages = self.read.source_pages[blocks.start - whole.start : blocks.stop - whole.start]
        return Slice(msgspec.structs.replace(self.read, blocks=blocks, source_pages=pages), blocks.stop == whole.stop)


class PullQueue(Generic[Owner]):
    """Reads wait here, each transfer's in order; transfers take turns, so that no long one holds up a short one.

    Owned by the agent thread. Without a rate everything may be posted at once.
    """

    def __init__(self, rate: PullRate | None = None) -> None:
        self._rate = rate
        self._waiting: dict[Owner, deque[_Waiting]] = {}

    @property
    def is_limited(self) -> bool:
        return self._rate is not None

    def put(self, owner: Owner, read: Read, bytes_per_block: int) -> None:
        """``bytes_per_block``: what of one block travels, over all ranks."""
        at_once = read.blocks.num_blocks
        if self._rate is not None:
            at_once = max(1, self._rate.slice_bytes // max(1, bytes_per_block))
        self._waiting.setdefault(owner, deque()).append(_Waiting(read, bytes_per_block, at_once))

    def take(self, now: float) -> Iterator[tuple[Owner, Slice]]:
        """What may be posted now. Between two slices the caller may put more, or drop."""
        while self._waiting and (self._rate is None or now >= self._rate.ready_at):
            owner = next(iter(self._waiting))
            mine = self._waiting.pop(owner)
            piece = mine[0].cut()
            if self._rate is not None:
                self._rate.take(piece.read.blocks.num_blocks * mine[0].bytes_per_block, now)
            if piece.is_last:
                mine.popleft()
            if mine:
                self._waiting[owner] = mine  # behind all others
            yield owner, piece

    def drop(self, owner: Owner) -> list[int]:
        """Forget what waits of a transfer; returns the numbers of the reads that are cut short."""
        return [waiting.read.read for waiting in self._waiting.pop(owner, ())]

    def next_wakeup(self) -> float | None:
        """When something may be posted; None while nothing waits."""
        if not self._waiting:
            return None
        return self._rate.ready_at if self._rate is not None else 0.0
