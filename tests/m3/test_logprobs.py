"""Log-probabilities of prompts and answers: transformers' own, however a prompt is chunked, and only when asked for."""

from pathlib import Path

import numpy as np
import pytest
import torch

from pdkv.m3.engine import Engine
from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import (
    CompleteRequest,
    EngineEvent,
    EngineRequest,
    EngineSettings,
    PrefillFinished,
    PrefillRequest,
    PromptScored,
    RequestId,
    RequestRefused,
    TokenGenerated,
)
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.undivided import local_worker
from tests.checkpoints import Oracle, write_random_checkpoint

TOLERANCE = 2e-4
PROMPT = tuple(np.random.default_rng(7).integers(3, 320, 400).tolist())


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_random_checkpoint(directory, 3)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> torch.Tensor:
    """What transformers thinks of PROMPT: [num_tokens, vocab], row i of what follows token i."""
    return torch.tensor(Oracle(checkpoint).logits(list(PROMPT))).log_softmax(-1)


def engine(model: M3Model, prefill_chunk: int = 150) -> Engine:
    return local_worker(model, 12, EngineSettings(max_model_len=1024, prefill_chunk=prefill_chunk)).engine


def run(engine: Engine, *requests: EngineRequest) -> list[EngineEvent]:
    events = [event for request in requests for event in engine.submit(request)]
    while engine.has_work:
        events += engine.step()
    return events


def prefill(number: int = 1, prompt: tuple[int, ...] = PROMPT, prompt_top: int | None = 3) -> PrefillRequest:
    request_id = RequestId(b"%d" % number)
    return PrefillRequest(id=request_id, prompt=prompt, sampling=SamplingParams(), num_top=2, prompt_top=prompt_top)


def scored(events: list[EngineEvent], number: int = 1) -> PromptLogprobs:
    mine = [event for event in events if isinstance(event, PromptScored) and event.id == b"%d" % number]
    return PromptLogprobs.join([event.logprobs for event in mine])


@pytest.mark.parametrize("chunk", [1024, 150, 129, 64])
def test_a_prompt_is_scored_as_transformers_scores_it(model: M3Model, expected: torch.Tensor, chunk: int) -> None:
    logprobs = scored(run(engine(model, chunk), prefill()))
    assert logprobs.fits(399, 3)
    own, top = logprobs.unpack()
    wanted = expected[:-1].gather(1, torch.tensor(PROMPT[1:])[:, None])[:, 0]
    assert own == pytest.approx(wanted.tolist(), abs=TOLERANCE)
    values = expected[:-1].topk(3, dim=-1).values
    assert [value for entry in top for value in entry.logprobs] == pytest.approx(
        values.flatten().tolist(), abs=TOLERANCE
    )
    for row, entry in enumerate(top):
        assert expected[row, list(entry.token_ids)].tolist() == pytest.approx(entry.logprobs, abs=TOLERANCE)


def test_requests_of_one_step_are_scored_each_for_itself(model: M3Model) -> None:
    prompts = {number: PROMPT[number : 40 * number] for number in (1, 2, 3)}
    together = run(
        engine(model, 70),
        *(prefill(number, prompt, number if number != 2 else None) for number, prompt in prompts.items()),
    )
    assert scored(together, 2).num_tokens == 0
    for number in (1, 3):
        alone = scored(run(engine(model), prefill(number, prompts[number], number)), number)
        mine = scored(together, number)
        assert mine.fits(len(prompts[number]) - 1, number)
        assert mine.num_top == number
        assert mine.unpack()[0] == pytest.approx(alone.unpack()[0], abs=TOLERANCE)


def test_generated_tokens_are_told_with_the_likeliest(model: M3Model, expected: torch.Tensor) -> None:
    (first,) = (e for e in run(engine(model), prefill(prompt_top=None)) if isinstance(e, PrefillFinished))
    assert first.top.token_ids == tuple(expected[-1].topk(2).indices.tolist())
    assert first.top.logprobs == pytest.approx(expected[-1].topk(2).values.tolist(), abs=TOLERANCE)
    assert first.top.logprobs[0] == first.logprob, "the chosen token's own, to the last bit"
    request = CompleteRequest(
        id=RequestId(b"1"), prompt=PROMPT, max_tokens=3, sampling=SamplingParams(), num_top=2, prompt_top=0
    )
    events = run(engine(model), request)
    assert scored(events).fits(399, 0)
    generated = [event for event in events if isinstance(event, TokenGenerated)]
    assert generated[0].top == first.top
    assert [event.top.token_ids[0] for event in generated] == [event.token for event in generated]


def test_what_is_not_asked_for_is_not_computed(model: M3Model) -> None:
    request = PrefillRequest(id=RequestId(b"1"), prompt=PROMPT, sampling=SamplingParams())
    events = run(engine(model), request)
    assert not any(isinstance(event, PromptScored) for event in events)
    (finished,) = (event for event in events if isinstance(event, PrefillFinished))
    assert finished.top == NO_TOP


def test_a_prompt_of_one_token_has_nothing_to_score(model: M3Model) -> None:
    assert scored(run(engine(model), prefill(prompt=(5,)))).num_tokens == 0


def test_a_prompt_that_cannot_be_scored_ends_alone(checkpoint: Path) -> None:
    damaged = load_model(checkpoint)
    damaged._weights.embed[7] = torch.nan
    made = engine(damaged, 20)
    events = run(made, prefill(1, (7, *PROMPT[:50])), prefill(2, tuple(t for t in PROMPT[:30] if t != 7)))
    (refused,) = (event for event in events if isinstance(event, RequestRefused))
    assert refused.id == b"1"
    assert "not finite" in refused.message
    assert any(isinstance(event, PrefillFinished) and event.id == b"2" for event in events)
    made.release(RequestId(b"2"))
    assert made.statistics().num_pages_free == 12


def test_packing_keeps_order_and_refuses_what_is_cut_off() -> None:
    own, ids, top = np.array([-1.5, -2.0]), np.array([[3, 2**31], [5, 6]]), np.array([[-0.5, -1.0], [-2.0, -3.0]])
    packed = PromptLogprobs.pack(own, ids, top)
    assert packed.unpack() == ([-1.5, -2.0], [TopLogprobs((3, 2**31), (-0.5, -1.0)), TopLogprobs((5, 6), (-2.0, -3.0))])
    assert len(packed.own + packed.top_ids + packed.top) == PromptLogprobs.num_bytes(2, 2)
    assert PromptLogprobs.join([packed, packed]).unpack()[0] == [-1.5, -2.0] * 2
    assert packed.fits(2, 2)
    assert not packed.fits(3, 2)
    assert not packed.fits(2, 1)
    assert not PromptLogprobs(2, packed.own, packed.top_ids[:-1], packed.top).fits(2, 2)
