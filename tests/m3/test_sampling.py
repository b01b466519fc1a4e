"""Sampling: greedy ties, and temperature as a pure function of seed and position."""

import math

import pytest
import torch

from pdkv.errors import ModelError, RequestError
from pdkv.m3 import sampling
from pdkv.m3.logprobs import NO_TOP
from pdkv.m3.sampling import SamplingParams, sample


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-1.0, -1.0, -1.0, -1.0]])
    first, second = sample(logits, [SamplingParams()] * 2, [0, 1])
    tokens, logprobs = [first.token, second.token], [first.logprob, second.logprob]
    assert tokens == [1, 0]
    expected = logits.double().log_softmax(-1)
    assert logprobs == pytest.approx([float(expected[0, 1]), float(expected[1, 0])])


def test_a_draw_hangs_on_seed_and_position_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(40)]
    positions = list(range(100, 140))
    together = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], params[i : i + 1], [positions[i]])[0] for i in reversed(range(40))]
    assert together == alone[::-1]
    moved = sample(logits, params, [position + 1 for position in positions])
    reseeded = sample(logits, [SamplingParams(temperature=1.0, seed=s + 1000) for s in range(40)], positions)
    assert together != moved
    assert together != reseeded


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    logits[3] = -1e30
    temperature, n = 0.7, 4000
    params = [SamplingParams(temperature=temperature, seed=9)] * n
    tokens = [chosen.token for chosen in sample(logits.expand(n, 4), params, list(range(n)))]
    share = torch.tensor(tokens).bincount(minlength=4).double() / n
    expected = (logits.double() / temperature).softmax(-1)
    assert float((share - expected).abs().max()) < 0.03  # 4 standard deviations
    assert 3 not in tokens


def test_low_temperature_is_greedy_and_large_values_are_safe():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert sample(logits, [SamplingParams(temperature=1e-4, seed=3)], [7])[0].token == 0


def test_extreme_seeds_work_and_impossible_parameters_do_not():
    logits = torch.zeros(1, 1000)
    drawn = {seed: sample(logits, [SamplingParams(1.0, seed)], [5])[0].token for seed in (-1, 0, 2**64 - 1, -(2**63))}
    assert drawn[-1] == drawn[2**64 - 1]
    for bad in (
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"seed": 2**64},
        {"top_p": 1.1},
    ):
        with pytest.raises(RequestError):
            SamplingParams(**bad)


def draws(logits: torch.Tensor, count: int, **params: float) -> list[int]:
    asked = [SamplingParams(temperature=1.0, seed=4, **params)] * count
    return [chosen.token for chosen in sample(logits.expand(count, -1), asked, list(range(count)))]


def test_top_p_draws_from_the_likeliest_tokens_that_have_its_share():
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log()
    assert set(draws(logits, 400, top_p=0.39)) == {1}
    assert set(draws(logits, 400, top_p=0.41)) == {1, 3}
    assert set(draws(logits, 400, top_p=0.71)) == {1, 2, 3}
    assert set(draws(logits, 400, top_p=0.0)) == {1}
    share = torch.tensor(draws(logits, 4000, top_p=0.69)).bincount(minlength=4).double() / 4000
    assert share.tolist() == pytest.approx([0, 4 / 7, 0, 3 / 7], abs=0.03)


def test_a_nucleus_of_everything_changes_no_draw_and_equals_stay_in_order_of_their_ids():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(1))
    assert draws(logits, 50, top_p=1.0) == draws(logits, 50, top_p=1 - 1e-12)
    assert set(draws(torch.zeros(10), 200, top_p=0.25)) == {0, 1, 2}


def test_alternatives_are_told_where_they_are_asked_for():
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]]).expand(3, 4)
    none, two, many = sample(logits, [SamplingParams()] * 3, [0, 0, 0], [0, 2, 20])
    assert none.top == NO_TOP
    assert two.top.token_ids == (1, 3)
    assert two.top.logprobs[0] == two.logprob
    assert many.top.token_ids == (1, 3, 2, 0)
    assert sum(math.exp(value) for value in many.top.logprobs) == pytest.approx(1)


@pytest.mark.parametrize("at_once", [1, 150, 1 << 20])
def test_what_a_row_gives_hangs_on_no_other_row(monkeypatch: pytest.MonkeyPatch, at_once: int):
    """Every way of asking at once, in one step: as many rows as may be looked at together, and one by one."""
    logits = 3 * torch.randn(24, 50, generator=torch.Generator().manual_seed(2))
    ways = [(0.0, 1.0), (0.7, 1.0), (1.3, 0.4), (2.0, 0.0), (0.0, 0.5), (0.2, 0.9)]
    params = [SamplingParams(*ways[row % 6][:1], seed=row, top_p=ways[row % 6][1]) for row in range(24)]
    num_top = [row % 3 for row in range(24)]
    alone = [sample(logits[i : i + 1], params[i : i + 1], [i], num_top[i : i + 1])[0] for i in range(24)]
    monkeypatch.setattr(sampling, "_NUMBERS_AT_ONCE", at_once)
    assert sample(logits, params, list(range(24)), num_top) == alone
    assert [len(one.top.token_ids) for one in alone] == num_top


def test_damaged_logits_are_an_error_that_names_the_row():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    with pytest.raises(ModelError, match=r"rows \[1\]"):
        sample(logits, [SamplingParams()] * 3, [0, 0, 0])
