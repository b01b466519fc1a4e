"""Steps that are batch-invariant: all decodes have one shape, and answers are those of each request alone."""

from pathlib import Path

import pytest

from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.model import load_model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestId, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.verify.undivided import complete_with, local_worker
from tests.soak import write_tiny_checkpoint

PROMPTS = [tuple(range(10 + 7 * n, 60 + 40 * n)) for n in range(4)]
COUNTS = [9, 3, 6, 12]


def test_decode_steps_have_one_shape() -> None:
    settings = EngineSettings(max_model_len=1000, max_batch=20, batch_invariant=True)
    assert DecodeShapes.of(settings, 128, 100).batch_sizes == (20,)


@pytest.mark.parametrize("overlap", [True, False])
def test_whoever_else_is_there_each_request_gets_what_it_gets_alone(tmp_path: Path, overlap: bool) -> None:
    write_tiny_checkpoint(tmp_path)
    model = load_model(tmp_path)
    settings = EngineSettings(max_model_len=300, max_batch=3, prefill_chunk=64, batch_invariant=True, overlap=overlap)
    worker = local_worker(model, 12, settings)
    assert worker.runner.overlaps, "shaped on a CPU too"
    told = _ask(worker.engine)
    for number, (prompt, count) in enumerate(zip(PROMPTS, COUNTS, strict=True)):
        assert told[number] == list(complete_with(model, prompt, count, ignore_eos=True).token_ids)


def _ask(engine: Engine) -> dict[int, list[int]]:
    """All at once, but for the last, which comes when the others are under way."""
    told: dict[int, list[int]] = {number: [] for number in range(len(PROMPTS))}
    waiting = list(enumerate(zip(PROMPTS, COUNTS, strict=True)))
    num_steps = 0
    while waiting or engine.has_work:
        while waiting and (len(waiting) > 1 or num_steps > 4):
            number, (prompt, count) = waiting.pop(0)
            engine.submit(
                CompleteRequest(
                    id=RequestId(bytes([number])),
                    prompt=prompt,
                    max_tokens=count,
                    sampling=SamplingParams(),
                    ignore_eos=True,
                )
            )
        for event in singly(engine.step()):
            if isinstance(event, TokenGenerated):
                told[event.id[0]].append(event.token)
        num_steps += 1
    return told
