"""Sampling: greedy ties, and temperature as a pure function of seed and position."""

import pytest
import torch

from pdkv.errors import ModelError, RequestError
from pdkv.m3.sampling import SamplingParams, sample


def test_greedy_takes_the_lowest_id_among_equals():
    logits = torch.tensor([[0.0, 3.0, 1.0, 3.0], [-1.0, -1.0, -1.0, -1.0]])
    tokens, logprobs = sample(logits, [SamplingParams()] * 2, [0, 1])
    assert tokens == [1, 0]
    expected = logits.double().log_softmax(-1)
    assert logprobs == pytest.approx([float(expected[0, 1]), float(expected[1, 0])])


def test_a_draw_hangs_on_seed_and_position_alone():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, 50, generator=generator)
    params = [SamplingParams(temperature=1.0, seed=seed) for seed in range(40)]
    positions = list(range(100, 140))
    together, logprobs = sample(logits, params, positions)
    alone = [sample(logits[i : i + 1], params[i : i + 1], [positions[i]]) for i in reversed(range(40))]
    assert together == [tokens[0] for tokens, _ in reversed(alone)]
    assert logprobs == [values[0] for _, values in reversed(alone)]
    moved, _ = sample(logits, params, [position + 1 for position in positions])
    reseeded, _ = sample(logits, [SamplingParams(temperature=1.0, seed=s + 1000) for s in range(40)], positions)
    assert together != moved
    assert together != reseeded


def test_draws_follow_the_distribution():
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])
    logits[3] = -1e30
    temperature, n = 0.7, 4000
    params = [SamplingParams(temperature=temperature, seed=9)] * n
    tokens, _ = sample(logits.expand(n, 4), params, list(range(n)))
    share = torch.tensor(tokens).bincount(minlength=4).double() / n
    expected = (logits.double() / temperature).softmax(-1)
    assert float((share - expected).abs().max()) < 0.03  # 4 standard deviations
    assert 3 not in tokens


def test_low_temperature_is_greedy_and_large_values_are_safe():
    logits = torch.tensor([[1e4, 1e4 - 1, -1e4]])
    assert sample(logits, [SamplingParams(temperature=1e-4, seed=3)], [7])[0] == [0]


def test_extreme_seeds_work_and_impossible_parameters_do_not():
    logits = torch.zeros(1, 1000)
    drawn = {seed: sample(logits, [SamplingParams(1.0, seed)], [5])[0][0] for seed in (-1, 0, 2**64 - 1, -(2**63))}
    assert drawn[-1] == drawn[2**64 - 1]
    for bad in ({"temperature": -1.0}, {"temperature": float("nan")}, {"temperature": float("inf")}, {"seed": 2**64}):
        with pytest.raises(RequestError):
            SamplingParams(**bad)


def test_damaged_logits_are_an_error_that_names_the_row():
    logits = torch.zeros(3, 4)
    logits[1, 2] = torch.nan
    with pytest.raises(ModelError, match=r"rows \[1\]"):
        sample(logits, [SamplingParams()] * 3, [0, 0, 0])
