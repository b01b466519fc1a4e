"""The page pool against plain sets: nothing twice, nothing lost, nothing shared written to, long runs preferred."""

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, precondition, rule

from pdkv.errors import CapacityError
from pdkv.memory.pages import PagePool

NUM_PAGES = 40


class PoolMachine(RuleBasedStateMachine):
    """Holders of pages, each with the pages it shares; names are numbers, and a name stands for one content."""

    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, reserved=(0, NUM_PAGES - 1))
        self.usable = set(range(1, NUM_PAGES - 1))
        self.holders: Counter[int] = Counter()
        self.names: dict[int, bytes] = {}
        self.idle: list[int] = []
        """Kept pages without a holder, the first to be given up first."""
        self.num_names = 0

    @property
    def empty(self) -> set[int]:
        return self.usable - set(self.holders) - set(self.idle)

    @rule(target=held, n=st.integers(0, NUM_PAGES))
    def reserve(self, n: int) -> tuple[int, ...]:
        if n > len(self.empty) + len(self.idle):
            with pytest.raises(CapacityError):
                self.pool.reserve(n)
            return ()
        while n > len(self.empty):
            del self.names[self.idle.pop(0)]
        longest = self.longest_run()
        empty = self.empty
        pages = self.pool.reserve(n)
        assert len(pages) == n
        assert set(pages) <= empty
        if n <= longest:
            assert list(pages) == list(range(pages[0], pages[0] + n)) if pages else True
        self.holders.update(pages)
        return pages

    @rule(pages=consumes(held))
    def give_back(self, pages: tuple[int, ...]) -> None:
        self.pool.free(pages)
        self.holders -= Counter(pages)
        self.idle += [page for page in reversed(pages) if page in self.names and page not in self.holders]

    @rule(pages=held)
    def keep(self, pages: tuple[int, ...]) -> None:
        """The first page that has no name yet, as a request does when a block is complete."""
        page = next((page for page in pages if page not in self.names), None)
        if page is None:
            return
        self.num_names += 1
        self.names[page] = b"%d" % self.num_names
        assert self.pool.keep(page, self.names[page]) == page
        assert self.pool.find([self.names[page], b"nothing"]) == (page,)

    @precondition(lambda self: self.names)
    @rule(pages=held, data=st.data())
    def keep_what_is_kept_already(self, pages: tuple[int, ...], data: st.DataObject) -> None:
        page, name = data.draw(st.sampled_from(sorted(self.names.items())))
        for mine in pages[:1]:
            assert self.pool.keep(mine, name) == page
            assert self.pool.is_writable(mine) == (self.holders[mine] == 1 and mine not in self.names)

    @precondition(lambda self: self.names)
    @rule(target=held, data=st.data())
    def share(self, data: st.DataObject) -> tuple[int, ...]:
        wanted = data.draw(st.lists(st.sampled_from(sorted(self.names)), unique=True, max_size=4))
        found = self.pool.find([self.names[page] for page in wanted])
        assert found == tuple(wanted)
        assert self.pool.can_reserve(len(self.empty) + len(set(self.idle) - set(found)), beside=found)
        assert not self.pool.can_reserve(len(self.empty) + len(set(self.idle) - set(found)) + 1, beside=found)
        self.pool.share(found)
        self.holders.update(found)
        self.idle = [page for page in self.idle if page not in found]
        return found

    @rule()
    def keep_nothing(self) -> None:
        self.pool.keep_nothing()
        self.names.clear()
        self.idle.clear()

    def longest_run(self) -> int:
        best = run = 0
        empty = self.empty
        for page in range(NUM_PAGES):
            run = run + 1 if page in empty else 0
            best = max(best, run)
        return best

    @invariant()
    def counts_agree(self) -> None:
        stats = self.pool.statistics()
        empty = len(self.empty)
        assert stats.num_free == self.pool.num_free == empty + len(self.idle)
        assert stats.num_kept == len(self.names)
        assert stats.largest_run == self.longest_run()
        expected = 1 - stats.largest_run / empty if empty else 0.0
        assert stats.fragmentation == expected == self.pool.fragmentation()

    @invariant()
    def only_a_sole_holder_of_a_page_without_a_name_may_write(self) -> None:
        for page in self.usable:
            assert self.pool.is_writable(page) == (self.holders[page] == 1 and page not in self.names)


PoolMachine.TestCase.settings = settings(max_examples=80, stateful_step_count=40)
TestPool = PoolMachine.TestCase


def test_a_chain_is_given_up_from_its_end_and_is_one_run_again() -> None:
    pool = PagePool(8)
    first, second = pool.reserve(4), pool.reserve(4)
    for pages in (first, second):
        for page in pages:
            pool.keep(page, b"%d" % page)
    pool.free(first)
    pool.free(second)
    assert (pool.num_free, pool.statistics().num_kept) == (8, 8), "kept pages are free pages"
    assert pool.reserve(2) == (2, 3)
    assert pool.find([b"0", b"1", b"2"]) == (0, 1)
    pool.share([0])  # used again: now it outlives its like
    pool.free([0])
    assert pool.reserve(1) == (1,)
    assert pool.reserve(4) == (4, 5, 6, 7)
    assert pool.find([b"0"]) == (0,)
    assert pool.statistics().num_evictions == 7


def test_a_page_that_nobody_has_or_keeps_cannot_be_shared_or_kept() -> None:
    pool = PagePool(4)
    with pytest.raises(AssertionError, match="holds nothing"):
        pool.share([0])
    with pytest.raises(AssertionError, match="does not hold"):
        pool.keep(0, b"name")


def test_reserved_pages_are_never_handed_out() -> None:
    pool = PagePool(10, reserved=(0, 9))
    assert pool.num_usable == 8
    assert pool.reserve(8) == tuple(range(1, 9))
    assert not pool.can_reserve(1)


def test_a_page_is_not_freed_twice() -> None:
    pool = PagePool(4)
    pages = pool.reserve(2)
    pool.free(pages)
    with pytest.raises(AssertionError, match="not in use"):
        pool.free(pages)


def test_reserved_pages_must_exist() -> None:
    with pytest.raises(ValueError, match="below num_pages"):
        PagePool(4, reserved=(4,))
