"""The page pool against a plain set: nothing twice, nothing lost, long runs preferred."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pdkv.errors import CapacityError
from pdkv.memory.pages import PagePool

NUM_PAGES = 40


class PoolMachine(RuleBasedStateMachine):
    held = Bundle("held")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES, reserved=(0, NUM_PAGES - 1))
        self.free = set(range(1, NUM_PAGES - 1))

    @rule(target=held, n=st.integers(0, NUM_PAGES))
    def reserve(self, n: int) -> tuple[int, ...]:
        if n > len(self.free):
            with pytest.raises(CapacityError):
                self.pool.reserve(n)
            return ()
        longest = self.longest_run()
        pages = self.pool.reserve(n)
        assert len(pages) == n
        assert set(pages) <= self.free
        if n <= longest:
            assert list(pages) == list(range(pages[0], pages[0] + n)) if pages else True
        self.free -= set(pages)
        return pages

    @rule(pages=consumes(held))
    def give_back(self, pages: tuple[int, ...]) -> None:
        self.pool.free(pages)
        self.free |= set(pages)

    def longest_run(self) -> int:
        best = run = 0
        for page in range(NUM_PAGES):
            run = run + 1 if page in self.free else 0
            best = max(best, run)
        return best

    @invariant()
    def counts_agree(self) -> None:
        stats = self.pool.statistics()
        assert stats.num_free == len(self.free)
        assert stats.largest_run == self.longest_run()
        expected = 1 - stats.largest_run / stats.num_free if stats.num_free else 0.0
        assert stats.fragmentation == expected == self.pool.fragmentation()


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
TestPool = PoolMachine.TestCase


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
