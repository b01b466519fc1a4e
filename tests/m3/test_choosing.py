"""Tokens that are chosen where the logits are, some rows at a time and read at once: what ``sample`` gives."""

import pytest
import torch

from pdkv.m3.choosing import Choice, Chooser, ChoosingKernels, kernels_for
from pdkv.m3.sampling import SamplingParams, sample
from tests.gpu.models import cpu_model, small_config
from tests.m3.divided_draws import NUM_TOKENS, divided_answers, undivided_answers

NAMES = ("begin_rows", "greedy", "end_rows", "draw", "retell_rows")
VOCAB = 30


def named(kernels: ChoosingKernels) -> tuple[str, ...]:
    found = kernels.begin, kernels.choose, kernels.end, kernels.draw, kernels.retell
    return tuple(getattr(kernel, "__name__") for kernel in found)  # noqa: B009  a protocol's methods have none for mypy


def test_a_gpu_has_a_kernel_for_every_reference() -> None:
    assert named(kernels_for(torch.device("cuda"))) == NAMES
    assert named(kernels_for(torch.device("cpu"))) == tuple(f"{name}_ref" for name in NAMES)


def test_rows_get_what_one_look_at_all_of_them_gives() -> None:
    """More likeliest tokens than there are tokens are asked for, too."""
    logits = 2 * torch.randn(12, VOCAB, generator=torch.Generator().manual_seed(0))
    logits[5, 3] = torch.nan
    ways = [SamplingParams(), SamplingParams(0.7, -1), SamplingParams(1.3, 2**64 - 1, 0.6), SamplingParams(1.0, 5, 0.0)]
    choices = [Choice(ways[row % 4], 100 + row, (0, 3, 20)[row % 3]) for row in range(12)]
    chooser = Chooser(choices, torch.device("cpu"))
    for few in torch.split(logits, 5):
        chooser.choose(few)
    found = chooser.wait().samples()
    assert found[5] is None
    sound = [row for row in range(12) if row != 5]
    params, positions, num_top = zip(*(choices[row] for row in sound), strict=True)
    for one, wanted in zip(
        [found[row] for row in sound], sample(logits[sound], params, positions, num_top), strict=True
    ):
        assert one is not None
        assert (one.token, one.top.token_ids) == (wanted.token, wanted.top.token_ids)
        assert one.logprob == pytest.approx(wanted.logprob, abs=1e-6)
        assert one.top.logprobs == pytest.approx(wanted.top.logprobs)


def test_a_divided_engine_draws_what_an_undivided_one_does() -> None:
    """The first token is drawn where the prompt is computed, the others by shaped steps, of others' company."""
    model = cpu_model(small_config("float32"))
    divided, undivided = divided_answers(model), undivided_answers(model)
    for number, wanted in undivided.items():
        assert len(wanted) == NUM_TOKENS
        assert [token for token, _, _ in divided[number]] == [token for token, _, _ in wanted]
        for (_, logprob, top), (_, its, its_top) in zip(divided[number], wanted, strict=True):
            assert logprob == pytest.approx(its, abs=1e-4)
            assert top.token_ids == its_top.token_ids
