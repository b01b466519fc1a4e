"""Draws of prefill and decode in two engines, against one engine that does both."""

from pdkv.m3.logprobs import TopLogprobs
from pdkv.m3.model import M3Model
from pdkv.m3.requests import (
    CompleteRequest,
    DecodeRequest,
    EngineEvent,
    EngineSettings,
    PagesReserved,
    PrefillFinished,
    PrefillRequest,
    RequestId,
    TokenGenerated,
    singly,
)
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.undivided import LocalWorker, local_worker

SETTINGS = EngineSettings(max_model_len=400, max_batch=4, prefill_chunk=256, batch_invariant=True)
WAYS = (
    (SamplingParams(temperature=1.4, seed=11), 0),
    (SamplingParams(temperature=0.8, seed=-3, top_p=0.9), 3),
    (SamplingParams(), 2),
)
PROMPTS = [tuple((number * 41 + i * 7) % 317 + 3 for i in range(130 + 60 * number)) for number in range(len(WAYS))]
NUM_TOKENS = 20

Told = dict[int, list[tuple[int, float, TopLogprobs]]]


def undivided_answers(model: M3Model) -> Told:
    """Of all of ``PROMPTS`` at once."""
    worker = local_worker(model, 16, SETTINGS)
    told: Told = {number: [] for number in range(len(PROMPTS))}
    for number, (sampling, num_top) in enumerate(WAYS):
        request = CompleteRequest(
            id=RequestId(bytes([number])),
            prompt=PROMPTS[number],
            max_tokens=NUM_TOKENS,
            sampling=sampling,
            ignore_eos=True,
            num_top=num_top,
        )
        worker.engine.submit(request)
    _run(worker, told)
    return told


def divided_answers(model: M3Model) -> Told:
    """The same: prefilled in one engine, each alone, decoded in another, whose pages are others."""
    prefill, decode = local_worker(model, 16, SETTINGS), local_worker(model, 16, SETTINGS)
    told: Told = {number: [] for number in range(len(PROMPTS))}
    for number in reversed(range(len(PROMPTS))):
        _divide(prefill, decode, number, told)
    _run(decode, told)
    return told


def _divide(prefill: LocalWorker, decode: LocalWorker, number: int, told: Told) -> None:
    id_, prompt, (sampling, num_top) = RequestId(bytes([number])), PROMPTS[number], WAYS[number]
    asked = PrefillRequest(id=id_, prompt=prompt, sampling=sampling, num_top=num_top)
    events = prefill.engine.submit(asked)
    while prefill.engine.has_work:
        events += prefill.engine.step()
    (source,) = (event.pages for event in events if isinstance(event, PagesReserved))
    (first,) = (event for event in events if isinstance(event, PrefillFinished))
    (reserved,) = decode.engine.submit(
        DecodeRequest(id=id_, prompt=prompt, max_tokens=NUM_TOKENS, sampling=sampling, ignore_eos=True, num_top=num_top)
    )
    assert isinstance(reserved, PagesReserved)
    decode.arena.rows()[list(reserved.pages[: len(source)])] = prefill.arena.rows()[list(source)]
    prefill.engine.release(id_)
    _hear(decode.engine.resume(id_, first.token, first.logprob, first.top), told)


def _run(worker: LocalWorker, told: Told) -> None:
    while worker.engine.has_work:
        _hear(worker.engine.step(), told)


def _hear(events: list[EngineEvent], told: Told) -> None:
    for event in singly(events):
        if isinstance(event, TokenGenerated):
            told[event.id[0]].append((event.token, event.logprob, event.top))
