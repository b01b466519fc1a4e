"""Prompt lookup against a search that compares every place with every length."""

from hypothesis import given
from hypothesis import strategies as st

from pdkv.m3.speculation import PromptLookup


def propose(tokens: list[int], count: int) -> tuple[int, ...]:
    return PromptLookup().propose(tokens, count)


def test_what_followed_before_is_proposed_again() -> None:
    assert propose([1, 2, 3, 4, 5, 9, 2, 3], 3) == (4, 5, 9)
    assert propose([1, 2, 3, 4, 5, 9, 2, 3], 1) == (4,)
    assert propose([1, 2, 3, 4, 5, 9, 2, 3], 0) == ()


def test_the_longest_agreement_wins_and_the_latest_of_equals() -> None:
    assert propose([7, 2, 3, 4, 0, 8, 2, 3, 5, 0, 7, 2, 3], 1) == (4,)
    assert propose([7, 2, 3, 4, 0, 7, 2, 3, 5, 0, 7, 2, 3], 1) == (5,)


def test_a_repetition_is_taken_to_go_on() -> None:
    assert propose([5, 5, 5], 4) == (5, 5, 5, 5)
    assert propose([1, 2, 3, 1, 2, 3, 1, 2], 5) == (3, 1, 2, 3, 1)


def test_nothing_is_proposed_without_two_tokens_that_agree() -> None:
    assert propose([1, 2, 3, 4], 4) == ()
    assert propose([3, 1, 2, 3], 4) == ()
    assert propose([1], 4) == ()
    assert propose([1, 1], 4) == ()


@given(st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_any_text(tokens: list[int], count: int) -> None:
    best: tuple[int, int] | None = None
    for end in range(2, len(tokens)):
        length = 0
        while length < end and tokens[end - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= 2:
            best = max(best or (0, 0), (length, end))
    copied: list[int] = list(tokens)
    for i in range(count if best else 0):
        copied.append(copied[best[1] + i] if best else 0)
    grown = PromptLookup()
    for length in range(len(tokens)):
        grown.propose(tokens[:length], count)
    places = sum(tokens[i : i + 2] == tokens[-2:] for i in range(len(tokens) - 2)) if len(tokens) > 2 else 0
    if places <= 16:
        assert propose(tokens, count) == tuple(copied[len(tokens) :])
    assert grown.propose(tokens, count) == propose(tokens, count), "whether it grew or came whole"
