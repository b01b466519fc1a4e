"""The engine on a real model: divided, batched, chunked or crowded, each request is answered as if it were alone."""

import json
from pathlib import Path

import pytest
import torch

from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import (
    CompleteRequest,
    DecodeRequest,
    EngineEvent,
    EngineRequest,
    EngineSettings,
    FinishReason,
    PagesReserved,
    PrefillFinished,
    PrefillProgress,
    PrefillRequest,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
)
from pdkv.m3.run import Run
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner, step_batch
from pdkv.memory.pages import PagePool
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.state_loss import copy_state, prefill
from pdkv.verify.undivided import Answer, LocalWorker, complete, complete_with, local_worker

HOT = SamplingParams(temperature=30.0, seed=5)
"""Hot enough that the checkpoint, sure of its answers, gives all kinds of tokens."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


def rid(number: int) -> RequestId:
    return RequestId(b"%d" % number)


def worker(model: M3Model, num_pages: int, **changed: int) -> LocalWorker:
    """A worker whose memory is full of NaN: whatever is read before it is written shows."""
    made = local_worker(model, num_pages, EngineSettings(**{"max_model_len": 4096, **changed}))
    for region in made.arena.regions():
        made.arena.view(region.name, region.layer).fill_(torch.nan)
    return made


def run_all(engine: Engine, events: list[EngineEvent] | None = None) -> list[EngineEvent]:
    told = list(events or [])
    while engine.has_work:
        told += engine.step()
    return told


def tokens_of(events: list[EngineEvent], request_id: RequestId) -> list[int]:
    return [event.token for event in events if isinstance(event, TokenGenerated) and event.id == request_id]


def undivided(number: int, num_tokens: int, max_tokens: int, sampling: SamplingParams = HOT) -> CompleteRequest:
    prompt = make_prompt(number, num_tokens).token_ids
    return CompleteRequest(id=rid(number), prompt=prompt, max_tokens=max_tokens, sampling=sampling)


def alone(model: M3Model, request: CompleteRequest) -> Answer:
    return complete_with(model, request.prompt, request.max_tokens, request.sampling)


@pytest.mark.parametrize("num_tokens", [127, 128, 129])
@pytest.mark.parametrize("sampling", [SamplingParams(), HOT], ids=["greedy", "hot"])
def test_prefill_here_and_decode_there_answer_as_one(model: M3Model, num_tokens: int, sampling: SamplingParams) -> None:
    prompt = make_prompt(1, num_tokens).token_ids
    whole = complete_with(model, prompt, 20, sampling)
    there = worker(model, 5)
    source = worker(model, 2).engine
    events = run_all(source, source.submit(PrefillRequest(id=rid(1), prompt=prompt, sampling=sampling)))
    first = events[-1]
    assert isinstance(first, PrefillFinished)
    assert (first.token, first.logprob) == pytest.approx((whole.token_ids[0], whole.logprobs[0]), abs=1e-4)
    prefilled = prefill(model, prompt)
    (reserved,) = there.engine.submit(DecodeRequest(id=rid(1), prompt=prompt, max_tokens=20, sampling=sampling))
    assert isinstance(reserved, PagesReserved)
    assert not there.engine.has_work
    copy_state(prefilled, there.arena, reserved.pages)
    events = run_all(there.engine, there.engine.resume(rid(1), first.token, first.logprob))
    assert tuple(tokens_of(events, rid(1))) == whole.token_ids
    logprobs = [event.logprob for event in events if isinstance(event, TokenGenerated)]
    assert logprobs == pytest.approx(whole.logprobs, abs=1e-4)
    assert events[-1] == RequestFinished(rid(1), FinishReason.LENGTH)


def test_requests_in_one_batch_do_not_disturb_each_other(model: M3Model) -> None:
    """More requests than slots, chunks that end anywhere, pages reused while others run."""
    requests = [undivided(number, 64 + 37 * number, 4 + 3 * number) for number in range(1, 6)]
    made = worker(model, 9, prefill_chunk=50, max_batch=3)
    events: list[EngineEvent] = []
    for request in requests:
        events += made.engine.submit(request)
    assert made.engine.statistics().num_queued > 0
    events = run_all(made.engine, events)
    for request in requests:
        assert tuple(tokens_of(events, request.id)) == alone(model, request).token_ids
        assert events.count(RequestFinished(request.id, FinishReason.LENGTH)) == 1
    statistics = made.engine.statistics()
    assert statistics.num_pages_free == statistics.num_pages_usable == 9
    assert statistics.num_steps > 0


def test_released_requests_leave_the_others_alone(model: M3Model) -> None:
    made = worker(model, 12, prefill_chunk=100)
    engine = made.engine
    kept, during_decode, during_prefill = undivided(1, 130, 12), undivided(2, 64, 60), undivided(3, 700, 9)
    events = [event for request in (kept, during_decode, during_prefill) for event in engine.submit(request)]
    while len(tokens_of(events, rid(2))) < 3:
        events += engine.step()
    engine.release(rid(2))
    engine.release(rid(3))
    engine.release(rid(3))
    engine.release(rid(99))
    late = undivided(4, 300, 5)
    events += run_all(engine, engine.submit(late))
    assert tuple(tokens_of(events, rid(1))) == alone(model, kept).token_ids
    assert tuple(tokens_of(events, rid(4))) == alone(model, late).token_ids
    assert len(tokens_of(events, rid(2))) == 3
    assert engine.statistics().num_pages_free == 12


def test_progress_means_that_the_pages_are_final(model: M3Model) -> None:
    prompt = make_prompt(2, 600).token_ids
    made = worker(model, 5)
    engine = Engine(StepRunner(model, made.arena), PagePool(5), EngineSettings(max_model_len=700, prefill_chunk=200))
    (reserved,) = engine.submit(PrefillRequest(id=rid(1), prompt=prompt, sampling=HOT))
    assert isinstance(reserved, PagesReserved)
    seen: list[tuple[int, list[torch.Tensor]]] = []
    while engine.has_work:
        for event in engine.step():
            if isinstance(event, PrefillProgress):
                seen.append((event.tokens_done, _complete_pages(made, reserved.pages, event.tokens_done)))
    assert [done for done, _ in seen] == [200, 400, 600]
    for done, pages in seen:
        final = _complete_pages(made, reserved.pages, done)
        assert all(torch.equal(early, late) for early, late in zip(pages, final, strict=True))
        assert not any(page.isnan().any() for page in pages)


def _complete_pages(made: LocalWorker, pages: tuple[int, ...], tokens_done: int) -> list[torch.Tensor]:
    complete_pages = list(pages[: tokens_done // 128])
    return [made.arena.view(s.name, s.layer)[complete_pages].clone() for s in made.arena.layout.kv.specs]


def test_a_queued_request_waits_without_work_and_is_told_at_once(model: M3Model) -> None:
    engine = worker(model, 4).engine
    first = DecodeRequest(id=rid(1), prompt=(5,) * 300, max_tokens=10, sampling=HOT)
    assert engine.submit(first) == [PagesReserved(rid(1), (0, 1, 2))]
    assert engine.submit(undivided(2, 200, 10)) == []
    assert not engine.has_work
    assert engine.step() == []
    engine.release(rid(1))
    assert engine.has_work
    assert engine.step() == [PagesReserved(rid(2), (0, 1))]
    assert engine.statistics().num_steps == 0, "a reservation is told before anything runs"
    assert run_all(engine)[-1] == RequestFinished(rid(2), FinishReason.LENGTH)


@pytest.mark.parametrize(
    "request_",
    [
        undivided(1, 4090, 7),
        PrefillRequest(id=rid(1), prompt=(4224,), sampling=HOT),
        PrefillRequest(id=rid(1), prompt=(), sampling=HOT),
    ],
    ids=["too long", "no such token", "empty"],
)
def test_what_cannot_be_served_is_refused(model: M3Model, request_: EngineRequest) -> None:
    engine = worker(model, 4).engine
    (event,) = engine.submit(request_)
    assert isinstance(event, RequestRefused)
    assert event.never
    assert not engine.has_work


def test_damaged_state_ends_the_one_request_that_attends_to_it(model: M3Model) -> None:
    made = worker(model, 8)
    damaged = DecodeRequest(id=rid(1), prompt=(5,) * 200, max_tokens=10, sampling=HOT)
    sound = undivided(2, 100, 6)
    events = made.engine.submit(damaged) + made.engine.submit(sound)
    events += made.engine.resume(rid(1), 64, 0.0)  # nobody filled its pages
    events = run_all(made.engine, events)
    (refusal,) = (event for event in events if isinstance(event, RequestRefused))
    assert refusal.id == rid(1)
    assert "not finite" in refusal.message
    assert tuple(tokens_of(events, rid(2))) == alone(model, sound).token_ids
    assert made.engine.statistics().num_pages_free == 8


def test_the_end_of_sequence_tokens_are_those_of_the_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    prompt = make_prompt(1, 64)
    config = json.loads((checkpoint / "config.json").read_text())
    config["eos_token_id"] = [2, prompt.expected(5)[-1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").hardlink_to(checkpoint / "model.safetensors")
    assert complete(tmp_path, prompt.token_ids, 20).token_ids == prompt.expected(5)
    assert complete(tmp_path, prompt.token_ids, 9, ignore_eos=True).token_ids == prompt.expected(9)


def test_a_step_batch_lays_runs_end_to_end() -> None:
    runs = [
        Run(id=rid(1), tokens=(7,), start=130, pages=(4, 9), sampling=HOT),
        Run(id=rid(2), tokens=(5, 6, 7), start=0, pages=(2, 8, 5), sampling=None),  # those that it will come to as well
        Run(id=rid(3), tokens=(8, 9), start=254, pages=(3, 1), sampling=HOT),
    ]
    batch = step_batch(runs, 128, torch.device("cpu"))
    assert batch.token_ids.tolist() == [7, 5, 6, 7, 8, 9]
    assert batch.positions.tolist() == [130, 0, 1, 2, 254, 255]
    assert batch.query_starts.tolist() == [0, 1, 4, 6]
    assert batch.context_lens.tolist() == [130, 0, 254]
    assert batch.page_table.tolist() == [[4, 9], [2, -1], [3, 1]]
    assert batch.logits_rows.tolist() == [0, 5]
