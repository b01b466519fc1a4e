"""Choosing tokens on a GPU: what a CPU chooses, of a vocabulary of M3's size."""

import pytest
import torch

from pdkv.m3.sampling import SamplingParams, sample
from tests.gpu.models import GPU

VOCAB, ROWS = 200_064, 48
WAYS = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (2.0, 1.0)]


def test_rows_of_every_kind_get_what_a_cpu_gives_them() -> None:
    """In float64, so that sums in another order choose another token once in a great many steps."""
    logits = 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[0, [7, 77]] = logits[0].max() + 1  # greedy takes the lowest id among equals
    kinds = [WAYS[row % len(WAYS)] for row in range(ROWS)]
    params = [SamplingParams(temperature, seed=row, top_p=top_p) for row, (temperature, top_p) in enumerate(kinds)]
    num_top = [3 * (row % 2) for row in range(ROWS)]
    positions = list(range(1000, 1000 + ROWS))
    wanted = sample(logits, params, positions, num_top)
    found = sample(logits.to(GPU), params, positions, num_top)
    assert found[0].token == 7
    assert [one.token for one in found] == [one.token for one in wanted]
    assert [one.top.token_ids for one in found] == [one.top.token_ids for one in wanted]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-9)
