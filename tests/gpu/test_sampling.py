"""Choosing tokens on a GPU: what a CPU chooses, of a vocabulary of M3's size, and the same in any company."""

import pytest
import torch

from pdkv.m3.choosing import Choice, Chooser
from pdkv.m3.sampling import Sample, SamplingParams, sample
from tests.gpu.models import GPU, gpu_model, small_config
from tests.m3.divided_draws import divided_answers, undivided_answers

VOCAB, ROWS = 200_064, 48
WAYS = [(0.0, 1.0), (1.0, 1.0), (0.7, 0.9), (1.5, 0.3), (2.0, 1.0)]
KINDS = [WAYS[row % len(WAYS)] for row in range(ROWS)]
CHOICES = [
    Choice(SamplingParams(temperature, seed=row, top_p=top_p), 1000 + row, 3 * (row % 2))
    for row, (temperature, top_p) in enumerate(KINDS)
]


def chosen(logits: torch.Tensor, choices: list[Choice], at_once: int = ROWS) -> list[Sample | None]:
    chooser = Chooser(choices, GPU)
    for few in torch.split(logits, at_once):
        chooser.choose(few)
    return chooser.wait().samples()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_every_kind_get_what_a_cpu_gives_them(dtype: torch.dtype) -> None:
    """Weights are in float32 here and in float64 there, so another token is drawn once in very many steps."""
    logits = (3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(0))).to(dtype)
    logits[0, [7, 77]] = logits[0].max() + 1  # greedy takes the lowest id among equals
    params, positions, num_top = zip(*CHOICES, strict=True)
    wanted = sample(logits.float(), params, positions, num_top)
    found = [one for one in chosen(logits.to(GPU), CHOICES) if one is not None]
    assert found[0].token == 7
    assert [one.token for one in found] == [one.token for one in wanted]
    if dtype == torch.float32:  # in bfloat16 there are equals, of which a CPU tells any
        assert [one.top.token_ids for one in found] == [one.top.token_ids for one in wanted]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_row_gives_hangs_on_no_other_row_and_no_place(dtype: torch.dtype) -> None:
    """Bit for bit."""
    logits = (3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(1))).to(GPU, dtype)
    together = chosen(logits, CHOICES)
    assert chosen(logits, CHOICES, at_once=5) == together
    assert chosen(logits.flip(0), CHOICES[::-1])[::-1] == together
    assert [chosen(logits[row : row + 1], CHOICES[row : row + 1])[0] for row in range(0, ROWS, 7)] == together[::7]


def test_a_vocabulary_in_bfloat16_gives_what_it_gives_in_float32() -> None:
    """Whoever prefills looks at logits in one of them, whoever decodes in the other. Rows whose end of the nucleus is a
    hair away may differ, and none here does."""
    logits = (3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(2))).to(GPU, torch.bfloat16)
    found, wanted = ([one for one in chosen(its, CHOICES) if one is not None] for its in (logits, logits.float()))
    assert [(one.token, one.top.token_ids) for one in found] == [(one.token, one.top.token_ids) for one in wanted]
    assert [one.logprob for one in found] == pytest.approx([one.logprob for one in wanted], abs=1e-5)


def test_a_divided_engine_draws_what_an_undivided_one_does() -> None:
    """Bit for bit: the first token is drawn where the prompt is computed, the others where it is decoded."""
    model = gpu_model(small_config("bfloat16"))
    assert divided_answers(model) == undivided_answers(model)
