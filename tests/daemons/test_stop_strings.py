"""Stop strings are found wherever they lie, and nothing of them is ever shown."""

from hypothesis import given
from hypothesis import strategies as st

from pdkv.daemons.stop_strings import StopScanner

TEXT = st.text("ab\n", max_size=12)
STOPS = st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=4)


def shown(pieces: list[str], stops: list[str]) -> tuple[list[str], StopScanner]:
    scanner = StopScanner(stops)
    return [scanner.push(piece) for piece in pieces] + [scanner.finish()], scanner


@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS)
def test_what_is_shown_is_the_text_up_to_the_first_piece_that_completes_a_stop(
    pieces: list[str], stops: list[str]
) -> None:
    out, scanner = shown(pieces, stops)
    expected, found = "".join(pieces), False
    for end in range(len(pieces) + 1):
        text = "".join(pieces[:end])
        starts = [text.find(stop) for stop in stops if stop in text]
        if starts:
            expected, found = text[: min(starts)], True
            break
    assert "".join(out) == expected
    assert scanner.found == found


@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS)
def test_nothing_that_became_a_stop_was_shown_before(pieces: list[str], stops: list[str]) -> None:
    out, _ = shown(pieces, stops)
    so_far = ""
    for piece in out:
        so_far += piece
        assert not any(stop in so_far for stop in stops)


@given(pieces=st.lists(TEXT, max_size=6), stops=STOPS)
def test_no_more_is_held_back_than_may_become_a_stop(pieces: list[str], stops: list[str]) -> None:
    scanner = StopScanner(stops)
    for piece in pieces:
        scanner.push(piece)
        assert scanner.num_held < max(map(len, stops), default=1)


def test_a_stop_across_three_pieces() -> None:
    out, scanner = shown(["x\n", "\n", "Q: y"], ["\n\nQ:"])
    assert out == ["x", "", "", ""]
    assert scanner.found
    assert shown(["x\n", "\n", "P"], ["\n\nQ:"])[0] == ["x", "", "\n\nP", ""]
    assert shown(["x\n"], ["\n\n"])[0] == ["x", "\n"]
