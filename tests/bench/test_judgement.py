"""Answers are judged behind their own text, by rounding that was measured, and by the log-probabilities told."""

import copy

import msgspec
import pytest
import torch

from pdkv.bench import serve
from pdkv.bench.answer_scores import Scorer
from pdkv.bench.judgement import Answer, Rounding, Scored, judge, judge_bits, rounding_of
from pdkv.errors import ModelError
from pdkv.m3.model import load_model
from pdkv.verify.equality import LOGIT_TOLERANCE
from pdkv.verify.undivided import complete_with
from tests.soak import write_tiny_checkpoint

PROMPT = tuple(range(20, 320))
STORED = ("auto", "auto")
LIMITS = Rounding(tokens=100, p50=0.001, max=0.025, token_margin=0.05, answer_margin=0.02, damage=0.2)


def scored(*behind: float) -> Scored:
    """Best tokens at -1, those of the answer so far behind."""
    count = len(behind)
    return Scored(tuple(-1 - b for b in behind), (-1.0,) * count, (7,) * count)


def test_rounding_is_what_one_engine_differs_from_itself_by():
    answers = [Answer((1, 2), (-1.0, -1.03)), Answer((3, 4), (-1.01, -0.95))]
    right, damaged = [scored(0, 0)] * 2, [scored(0.2, 0.4)] * 2
    seen = rounding_of(answers, right, damaged)
    assert (seen.tokens, seen.p50, seen.max, seen.token_margin) == pytest.approx((4, 0.02, 0.05, 0.1))
    assert seen.answer_margin == pytest.approx(2 * 0.03), "twice that of the answer that is off most"
    assert seen.damage == pytest.approx((0.285 + 0.32) / 2)
    assert seen.decides
    assert not rounding_of(answers, right, [scored(0.05, 0.06)] * 2).decides, "damage that looks like rounding"
    exact = rounding_of([Answer((1,), (-1.0,))], [scored(0)], damaged=[scored(1)])
    assert exact.token_margin == LOGIT_TOLERANCE, "where nothing was seen, sums of float32 may still differ"
    assert exact.answer_margin == LOGIT_TOLERANCE
    assert rounding_of(answers, right, damaged, 0.2).answer_margin == 0.2
    far = [Answer((1,), (-5.0,)), Answer((2,), (-5.0,))]
    as_far = rounding_of(far, [scored(4), scored(4)], [scored(9)], 0.2)
    assert as_far.answer_margin == 1.0, "a last place of numbers as large as -5"


def test_an_answer_that_went_another_way_by_rounding_is_judged_behind_its_own_text():
    """From its first other token on the whole text is another; that decides nothing."""
    alone = [Answer((1, 2, 3, 4)), Answer((5, 6, 7, 8))]
    answers = {0: Answer((1, 9, 9, 9)), 1: Answer((5, 6, 7, 8))}
    found = judge("divided", answers, alone, {0: scored(0, 0.04, 0, 0.01), 1: scored(0, 0, 0, 0)}, LIMITS)
    assert (found.compared, found.equal, found.wrong) == (2, 1, ())
    assert found.near_ties == ("divided, request 0, token 1: 9, alone 2; no token is more than 0.04 behind",)
    assert found.behind == pytest.approx(0.04)


def test_a_token_that_rounding_does_not_explain_is_wrong_wherever_it_stands():
    alone = [Answer((1, 2, 3, 4))]
    for behind in ((0, 0.06, 0, 0), (0, 0.04, 0, 0.06), (0, 0, float("nan"), 0)):
        found = judge("divided", {0: Answer((1, 9, 9, 9))}, alone, {0: scored(*behind)}, LIMITS)
        assert (found.equal, len(found.wrong), found.near_ties) == (0, 1, ()), behind
    text = judge("divided", {0: Answer((1, 9, 9, 9))}, alone, {0: scored(0, 0.04, 0, 0.06)}, LIMITS).wrong[0]
    assert text == "divided, request 0, token 3: 9 is 0.06 behind 7; rounding explains 0.05"


def test_a_right_token_with_a_wrong_log_probability_is_wrong():
    """What is damaged shows in the numbers before it shows in a choice."""
    alone = [Answer((1, 2))]
    found = judge("divided", {0: Answer((1, 2), (-1.01, -1.2))}, alone, {0: scored(0, 0)}, LIMITS)
    assert found.wrong == (
        "divided, request 0, token 1: 2 is told with log-probability -1.2 and has -1; rounding explains 0.05",
    )
    assert found.deviation == pytest.approx(0.2)
    assert judge("divided", {0: Answer((1, 2), (-1.01, -1.02))}, alone, {0: scored(0, 0)}, LIMITS).equal == 1


def test_an_answer_of_which_half_is_off_a_little_is_wrong():
    """Rounding that sends a token to another expert is seen in one of many; damaged state in all that follow."""
    for off, is_wrong in ((0.03, True), (0.01, False)):
        answer = Answer((1, 2, 3), (-1.0, -1 - off, -1 - off))
        found = judge("divided", {0: answer}, [Answer((1, 2, 3))], {0: scored(0, 0, 0)}, LIMITS)
        assert bool(found.wrong) is is_wrong
        assert found.typical_deviation == pytest.approx(off)
        if is_wrong:
            assert "half of its log-probabilities are off by 0.03 or more; rounding explains 0.02" in found.wrong[0]


def test_where_bits_are_compared_no_rounding_is_let_pass():
    alone = [Answer((1, 2), (-1.0, -2.0)), Answer((3, 4), (-1.0, -2.0)), Answer((5, 6), (-1.0, -2.0))]
    given = {0: alone[0], 1: Answer((3, 4), (-1.0, -2.0 - 2**-50)), 2: Answer((5, 7), (-1.0, -2.0))}
    found = judge_bits("divided", given, alone)
    assert (found.compared, found.equal, found.near_ties) == (3, 1, ())
    assert found.wrong[0].startswith("divided, request 1, token 1: 4 is told with log-probability -2.000000000000001")
    assert found.wrong[1] == "divided, request 2, token 1: 7, alone 6"
    assert judge_bits("divided", {0: Answer((1, 2))}, alone).equal == 1, "where none were told"


def test_a_run_in_which_rounding_hides_everything_says_so():
    alone = {0: Answer((1, 2), (-1.0, -1.0))}
    right = [{(1, 2): scored(0, 0)}]
    assert serve._judged({"divided": alone}, [alone[0]], right, LIMITS).undecided == ""
    noisy = msgspec.structs.replace(LIMITS, answer_margin=0.6)
    answers = serve._judged({"divided": alone}, [alone[0]], right, noisy)
    assert answers.undecided.startswith("half of an answer's tokens differ by 0.3 by rounding alone, and by 0.2 where")


def test_what_failed_is_not_judged():
    assert judge("divided", {}, [Answer((1,))], {}, LIMITS).compared == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory):
    directory = tmp_path_factory.mktemp("tiny")
    write_tiny_checkpoint(directory)
    return load_model(directory)


def test_the_models_own_answer_is_nowhere_behind_and_a_second_choice_only_there(model):
    answer = complete_with(model, PROMPT, 5, ignore_eos=True)
    scorer = Scorer(model, len(PROMPT) + 5, 192, STORED)
    (own,) = scorer.score(PROMPT, [answer.token_ids]).values()
    assert own.own == own.best, "every token is the best in its place"
    assert own.own == pytest.approx(answer.logprobs, abs=LOGIT_TOLERANCE)
    assert own.best_ids == answer.token_ids

    other = (*answer.token_ids[:2], (answer.token_ids[2] + 1) % model.config.vocab_size)
    rest = complete_with(model, PROMPT + other, 2, ignore_eos=True)
    its = scorer.score(PROMPT, [answer.token_ids, other + rest.token_ids])[other + rest.token_ids]
    behind = [best - own for best, own in zip(its.best, its.own, strict=True)]
    assert behind[2] > 0.01
    assert behind[:2] + behind[3:] == [0.0] * 4, "behind its own text the rest is right"


def test_the_state_of_one_other_token_shows_in_the_log_probabilities(model):
    """It need not change a choice: the answer of a prompt with one other token in it is judged as this prompt's."""
    other = (*PROMPT[:150], PROMPT[150] + 1, *PROMPT[151:])
    scorer = Scorer(model, len(PROMPT) + 5, 192, STORED)
    alone, damaged = (
        Answer(one.token_ids, one.logprobs)
        for one in (complete_with(model, prompt, 5, ignore_eos=True) for prompt in (PROMPT, other))
    )
    its = scorer.score(PROMPT, [alone.tokens, damaged.tokens])
    damaged_state = scorer.damaged(PROMPT, PROMPT[::-1], alone.tokens)
    rounding = rounding_of([alone], [its[alone.tokens]], [damaged_state])
    assert rounding.damage > 10 * rounding.answer_margin
    found = judge("divided", {0: damaged}, [alone], {0: its[damaged.tokens]}, rounding)
    assert len(found.wrong) == 1
    assert found.typical_deviation > 10 * rounding.token_margin


def test_a_model_that_says_nothing_finite_is_no_judge(model):
    damaged = copy.copy(model)
    damaged.logits = lambda hidden: torch.full((hidden.shape[0], model.config.vocab_size), float("nan"))
    with pytest.raises(ModelError, match="cannot be judged"):
        Scorer(damaged, len(PROMPT) + 2, 192, STORED).score(PROMPT, [(1, 2)])
