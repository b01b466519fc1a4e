"""What the hops' bench says of its differences: the interval of the median holds what it promises."""

from math import comb

import pytest

from pdkv.bench.hops import median_interval


@pytest.mark.parametrize("count", [6, 7, 20, 40, 100, 401])
def test_the_medians_interval_holds_19_times_of_20_and_is_no_wider_than_that_takes(count: int) -> None:
    """Of n values, the k-th and the l-th have the median between them when at least k and fewer than l lie below."""

    def held(low: int, high: int) -> float:
        return sum(comb(count, below) for below in range(low + 1, high + 1)) / float(2**count)

    low, high = (int(rank) for rank in median_interval(range(count)))
    assert held(low, high) >= 0.95
    assert low + high == count - 1
    assert count < 10 or held(low + 2, high - 2) < 0.95


def test_fewer_values_give_all_that_they_span() -> None:
    assert median_interval([1.5, 2.5, 9.0]) == (1.5, 9.0)
