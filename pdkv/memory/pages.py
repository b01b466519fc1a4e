"""The page pool: which pages of an arena are free, handed out in runs as long as they come."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence

import msgspec

from pdkv.errors import CapacityError


class PoolStatistics(msgspec.Struct, frozen=True):
    num_usable: int
    num_free: int
    num_runs: int
    largest_run: int
    fragmentation: float
    """1 - largest free run / free pages; 0 when all free pages are one run, or none is free."""


class PagePool:
    """Free pages of one arena. Owned by the engine thread; holds numbers only.

    ``reserved`` pages (the probe's first and last) are never handed out.
    """

    def __init__(self, num_pages: int, reserved: Iterable[int] = ()) -> None:
        held = frozenset(reserved)
        if not held <= set(range(num_pages)):
            raise ValueError(f"reserved pages {sorted(held)} are not all below num_pages = {num_pages}")
        self._used: set[int] = set()
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._num_free = 0
        self._num_usable = num_pages - len(held)
        for page in range(num_pages):
            if page not in held:
                self._insert_run(page, 1)

    @property
    def num_usable(self) -> int:
        return self._num_usable

    @property
    def num_free(self) -> int:
        return self._num_free

    def can_reserve(self, num_pages: int) -> bool:
        return num_pages <= self._num_free

    def reserve(self, num_pages: int) -> tuple[int, ...]:
        """Take pages, in the order in which blocks should use them: ascending inside each run.

        Takes the shortest run that holds them all, else the longest runs until they do, so that few runs come out and
        long runs survive. Raises ``CapacityError`` (and takes nothing) when fewer are free.
        """
        if not self.can_reserve(num_pages):
            raise CapacityError(f"{num_pages} pages wanted, {self._num_free} of {self._num_usable} free")
        pages: list[int] = []
        while len(pages) < num_pages:
            wanted = num_pages - len(pages)
            fitting = [s for s in self._starts if self._lengths[s] >= wanted]
            if fitting:
                start = min(fitting, key=lambda s: (self._lengths[s], s))
            else:
                start = max(self._starts, key=lambda s: (self._lengths[s], -s))
            pages.extend(self._take(start, wanted))
        self._used.update(pages)
        return tuple(pages)

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back. Freeing a page that is not in use is a broken invariant."""
        assert len(set(pages)) == len(pages), f"pages freed twice in one call: {pages}"
        unused = [page for page in pages if page not in self._used]
        assert not unused, f"pages freed that were not in use: {unused}"
        self._used.difference_update(pages)
        for page in pages:
            self._insert_run(page, 1)

    def fragmentation(self) -> float:
        return self.statistics().fragmentation

    def statistics(self) -> PoolStatistics:
        largest = max(self._lengths.values(), default=0)
        return PoolStatistics(
            num_usable=self._num_usable,
            num_free=self._num_free,
            num_runs=len(self._starts),
            largest_run=largest,
            fragmentation=1 - largest / self._num_free if self._num_free else 0.0,
        )

    def _take(self, start: int, wanted: int) -> range:
        length = self._lengths.pop(start)
        self._starts.remove(start)
        taken = min(wanted, length)
        self._num_free -= length
        if taken < length:
            self._insert_run(start + taken, length - taken)
        return range(start, start + taken)

    def _insert_run(self, start: int, length: int) -> None:
        """Add a free run, joined with the runs that touch it."""
        self._num_free += length
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + length:
            length += self._lengths.pop(self._starts.pop(at))
        if at > 0 and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == start:
            self._lengths[self._starts[at - 1]] += length
            return
        insort(self._starts, start)
        self._lengths[start] = length
