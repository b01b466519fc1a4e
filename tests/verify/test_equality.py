"""The equality rule: what passes, what is excused and reported, what fails."""

import numpy as np

from pdkv.verify.equality import combine, compare_logits, compare_tokens, is_decisive, top_gaps

ORACLE = np.array([[0.0, 1.0, 2.0], [5.0, 4.99995, 0.0], [1.0, 0.0, 0.5]], dtype=np.float32)


def test_gaps_and_cases_to_be_drawn_again():
    np.testing.assert_allclose(top_gaps(ORACLE), [1.0, 5e-5, 0.5], rtol=1e-2)
    assert not is_decisive(ORACLE)
    assert is_decisive(ORACLE[[0, 2]])


def test_equal_tokens():
    verdict = compare_tokens([2, 0, 0], [2, 0, 0], ORACLE)
    assert verdict.equal
    assert verdict.num_compared == 3
    assert not verdict.excused


def test_near_tie_is_excused_and_ends_the_comparison():
    verdict = compare_tokens([2, 1, 2], [2, 0, 0], ORACLE)
    assert verdict.equal
    assert verdict.num_compared == 2
    assert "token 1 is 1, the oracle says 0" in verdict.excused[0]


def test_wrong_tokens_fail_even_beside_a_near_tie():
    assert not compare_tokens([1, 0, 0], [2, 0, 0], ORACLE).equal
    assert not compare_tokens([2, 2, 0], [2, 0, 0], ORACLE).equal
    assert not compare_tokens([2, 0], [2, 0, 0], ORACLE).equal


def test_logits_within_and_beyond_tolerance():
    assert compare_logits(ORACLE + np.float32(5e-5), ORACLE).equal
    assert not compare_logits(ORACLE + np.float32(2e-4), ORACLE).equal
    assert not compare_logits(ORACLE[:2], ORACLE).equal
    spoiled = ORACLE.copy()
    spoiled[1, 1] = np.nan
    assert not compare_logits(spoiled, ORACLE).equal


def test_one_row_in_a_thousand_is_excused_and_reported():
    many = np.zeros((2000, 3), dtype=np.float32)
    off = many.copy()
    off[[5, 7], 0] = 1.0
    verdict = compare_logits(off, many)
    assert verdict.equal
    assert len(verdict.excused) == 2
    assert verdict.largest_difference == 1.0
    off[9, 0] = 1.0
    assert not compare_logits(off, many).equal


def test_excuses_add_up_over_cases():
    excused = compare_tokens([2, 1, 2], [2, 0, 0], ORACLE)
    assert combine([excused]).equal
    both = combine([excused, excused])
    assert not both.equal
    assert both.num_compared == 4
