"""The page pool: which pages of an arena are free, held, or kept under a name for whoever wants the same content."""

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Iterable, Sequence

import msgspec

from pdkv.errors import CapacityError


class PoolStatistics(msgspec.Struct, frozen=True):
    num_usable: int
    num_free: int
    """Pages that a reservation can have: those with nothing in them, and those that are only kept."""
    num_runs: int
    """Runs of pages with nothing in them; so are the largest, and what fragmentation is told of."""
    largest_run: int
    fragmentation: float
    """1 - largest run / pages with nothing in them; 0 when all of those are one run, or there are none."""
    num_kept: int = 0
    """Pages that are kept under a name, held or not."""
    num_evictions: int = 0
    """Kept pages that were given up to make room, since the start."""


class PagePool:
    """Pages of one arena. Owned by the engine thread; holds numbers only.

    A page in use has one holder or several; the last to free it gives it back. A page may be kept under a name (a
    digest of what is in it): it is found by that name while it has holders and after, until its room is needed. Pages
    that nobody holds are given up in the order in which they were let go; of pages freed in one call the last first,
    because nothing behind a page can be used without it. ``reserved`` pages (the probe's) are never handed out.
    """

    def __init__(self, num_pages: int, reserved: Iterable[int] = ()) -> None:
        held = frozenset(reserved)
        if not held <= set(range(num_pages)):
            raise ValueError(f"reserved pages {sorted(held)} are not all below num_pages = {num_pages}")
        self._holders: dict[int, int] = {}
        self._names: dict[int, bytes] = {}
        self._pages: dict[bytes, int] = {}
        # Kept pages without a holder; the first was let go longest ago.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._starts: list[int] = []
        self._lengths: dict[int, int] = {}
        self._num_empty = 0
        self._num_evictions = 0
        self._num_usable = num_pages - len(held)
        for page in range(num_pages):
            if page not in held:
                self._insert_run(page, 1)

    @property
    def num_usable(self) -> int:
        return self._num_usable

    @property
    def num_free(self) -> int:
        """Pages without a holder: equal to ``num_usable`` when nothing runs, whatever is kept."""
        return self._num_empty + len(self._idle)

    def can_reserve(self, num_pages: int, beside: Sequence[int] = ()) -> bool:
        """Whether so many pages can be had without giving up those of ``beside``."""
        return num_pages <= self.num_free - sum(page in self._idle for page in beside)

    def reserve(self, num_pages: int) -> tuple[int, ...]:
        """Take pages, in the order in which blocks should use them: ascending inside each run. The caller is their
        one holder.

        Takes the shortest run that holds them all, else the longest runs until they do, so that few runs come out and
        long runs survive. Gives up kept pages where the empty ones are too few. Raises ``CapacityError`` (and takes
        nothing) when even that is not enough.
        """
        if not self.can_reserve(num_pages):
            raise CapacityError(f"{num_pages} pages wanted, {self.num_free} of {self._num_usable} free")
        while self._num_empty < num_pages:
            self._evict()
        pages: list[int] = []
        while len(pages) < num_pages:
            wanted = num_pages - len(pages)
            fitting = [s for s in self._starts if self._lengths[s] >= wanted]
            if fitting:
                start = min(fitting, key=lambda s: (self._lengths[s], s))
            else:
                start = max(self._starts, key=lambda s: (self._lengths[s], -s))
            pages.extend(self._take(start, wanted))
        self._holders.update(dict.fromkeys(pages, 1))
        return tuple(pages)

    def share(self, pages: Iterable[int]) -> None:
        """Become one more holder of pages that are in use or kept."""
        for page in pages:
            assert page in self._holders or page in self._idle, f"page {page} holds nothing that could be shared"
            self._idle.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def free(self, pages: Sequence[int]) -> None:
        """Let go of pages, given in block order. Freeing a page that is not in use is a broken invariant."""
        assert len(set(pages)) == len(pages), f"pages freed twice in one call: {pages}"
        unused = [page for page in pages if page not in self._holders]
        assert not unused, f"pages freed that were not in use: {unused}"
        holders, names, idle = self._holders, self._names, self._idle
        for page in reversed(pages):
            if holders[page] > 1:
                holders[page] -= 1
                continue
            del holders[page]
            if page in names:
                idle[page] = None
            else:
                self._insert_run(page, 1)

    def keep(self, page: int, name: bytes) -> int:
        """Keep a held page under the name of what is in it; from now on nobody may write to it.

        Returns the page that is kept under that name: another one, which nobody has to write again, if it was first.
        """
        assert page in self._holders, f"page {page} is kept by somebody who does not hold it"
        if name not in self._pages:
            assert page not in self._names, f"page {page} is kept under another name"
            self._pages[name] = page
            self._names[page] = name
        return self._pages[name]

    def find(self, names: Iterable[bytes]) -> tuple[int, ...]:
        """The pages kept under the first of ``names``, up to the first that is not known."""
        found = []
        for name in names:
            if name not in self._pages:
                break
            found.append(self._pages[name])
        return tuple(found)

    def is_writable(self, page: int) -> bool:
        """It has one holder and is not kept."""
        return self._holders.get(page) == 1 and page not in self._names

    def keep_nothing(self) -> None:
        """Forget every name. Pages with holders stay theirs."""
        self._names.clear()
        self._pages.clear()
        while self._idle:
            self._insert_run(self._idle.popitem()[0], 1)

    def fragmentation(self) -> float:
        return self.statistics().fragmentation

    def statistics(self) -> PoolStatistics:
        largest = max(self._lengths.values(), default=0)
        return PoolStatistics(
            num_usable=self._num_usable,
            num_free=self.num_free,
            num_runs=len(self._starts),
            largest_run=largest,
            fragmentation=1 - largest / self._num_empty if self._num_empty else 0.0,
            num_kept=len(self._names),
            num_evictions=self._num_evictions,
        )

    def _evict(self) -> None:
        page, _ = self._idle.popitem(last=False)
        del self._pages[self._names.pop(page)]
        self._insert_run(page, 1)
        self._num_evictions += 1

    def _take(self, start: int, wanted: int) -> range:
        length = self._lengths.pop(start)
        self._starts.remove(start)
        taken = min(wanted, length)
        self._num_empty -= length
        if taken < length:
            self._insert_run(start + taken, length - taken)
        return range(start, start + taken)

    def _insert_run(self, start: int, length: int) -> None:
        """Add an empty run, joined with the runs that touch it."""
        self._num_empty += length
        at = bisect_left(self._starts, start)
        if at < len(self._starts) and self._starts[at] == start + length:
            length += self._lengths.pop(self._starts.pop(at))
        if at > 0 and self._starts[at - 1] + self._lengths[self._starts[at - 1]] == start:
            self._lengths[self._starts[at - 1]] += length
            return
        insort(self._starts, start)
        self._lengths[start] = length
