"""How a chunk is shared: all of it where it is needed, half for the oldest, nobody starves."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdkv.m3.chunks import share_chunk


@pytest.mark.parametrize(
    ("left", "budget", "shares"),
    [
        ([], 8, []),
        ([100], 8, [8]),
        ([100, 3], 8, [5, 3]),
        ([100, 90, 3], 8, [4, 1, 3]),
        ([100, 3, 3], 8, [4, 3, 1]),
        ([1, 100, 100], 8, [1, 7, 0]),
        ([100, 100], 1, [1, 0]),
        ([2, 2], 100, [2, 2]),
    ],
)
def test_examples(left: list[int], budget: int, shares: list[int]) -> None:
    assert share_chunk(left, budget) == shares


@given(st.lists(st.integers(1, 300), max_size=9), st.integers(1, 200))
def test_nothing_is_left_over_and_nobody_gets_too_much(left: list[int], budget: int) -> None:
    shares = share_chunk(left, budget)
    assert all(0 <= share <= need for share, need in zip(shares, left, strict=True))
    assert sum(shares) == min(budget, sum(left))
    assert not left or shares[0] >= min(left[0], budget / 2)


def test_a_long_prompt_and_a_stream_of_short_ones_both_go_on() -> None:
    """A long prompt, and two short ones that arrive every step: each short one is through in one, and the long
    one goes on with what they leave."""
    prompts, steps, ages = [1000], 0, []
    short: dict[int, int] = {}
    while prompts[0] > 0:
        prompts += [20, 20]
        short |= {len(prompts) - 2: steps, len(prompts) - 1: steps}
        live = [i for i, left in enumerate(prompts) if left]
        for i, share in zip(live, share_chunk([prompts[i] for i in live], 100), strict=True):
            prompts[i] -= share
            if prompts[i] == 0 and i:
                ages.append(steps - short[i])
        steps += 1
    assert steps == 17  # 1000 tokens at 60 a step
    assert ages == [0] * 34
