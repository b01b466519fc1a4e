"""Decode steps launched before the last one's tokens are known, on a GPU: equal answers, and no wait in between."""

from collections import Counter
from collections.abc import Sequence

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.logprobs import TopLogprobs
from pdkv.m3.model import M3Model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestFinished, RequestId, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from tests.gpu.models import GPU, gpu_model, small_config

Way = tuple[SamplingParams, int]
Told = tuple[int, float, TopLogprobs]
STEPS = 20
"""That are looked at, after those in which requests prefill and shapes are captured."""


WAYS = (
    (SamplingParams(), 0),
    (SamplingParams(temperature=1.3, seed=5), 0),
    (SamplingParams(temperature=0.8, seed=2**64 - 1, top_p=0.9), 4),
    (SamplingParams(), 2),
)
"""How requests are answered, by turns: what chooses their tokens, and how many likeliest are told."""


def engine_of(model: M3Model, *, overlap: bool, max_tokens: list[int], ways: Sequence[Way] = WAYS[:1]) -> Engine:
    """With a request for each of ``max_tokens``, all of whose prompts are computed; graphs are captured."""
    settings = EngineSettings(max_model_len=1024, max_batch=8, overlap=overlap)
    num_pages = 8 * len(max_tokens)
    arena = Arena.allocate(RowLayout.of(kv_layout(model.config, "fp8", "fp8")), num_pages, GPU)
    runner = StepRunner(model, arena, DecodeShapes.of(settings, 128, num_pages))
    runner.prepare()
    engine = Engine(runner, PagePool(num_pages), settings)
    for number, count in enumerate(max_tokens):
        engine.submit(request_of(number, count, ways))
    return engine


def request_of(number: int, max_tokens: int, ways: Sequence[Way]) -> CompleteRequest:
    sampling, num_top = ways[number % len(ways)]
    return CompleteRequest(
        id=RequestId(bytes([number])),
        prompt=tuple((number * 31 + i * 7) % 380 for i in range(60 + 90 * number)),
        max_tokens=max_tokens,
        sampling=sampling,
        ignore_eos=True,
        num_top=num_top,
    )


def answers(engine: Engine) -> dict[bytes, list[Told]]:
    told: dict[bytes, list[Told]] = {}
    ended = set()
    while engine.has_work:
        for event in singly(engine.step()):
            if isinstance(event, TokenGenerated):
                told.setdefault(event.id, []).append((event.token, event.logprob, event.top))
            elif isinstance(event, RequestFinished):
                ended.add(event.id)
    assert ended == told.keys()
    return told


@pytest.mark.parametrize("ways", [WAYS[:1], WAYS], ids=["greedy", "every way"])
def test_overlapped_steps_tell_the_same_bit_for_bit(ways: Sequence[Way]) -> None:
    model = gpu_model(small_config("bfloat16"))
    max_tokens = [40, 7, 23, 40, 1, 31]
    found = answers(engine_of(model, overlap=True, max_tokens=max_tokens, ways=ways))
    assert found == answers(engine_of(model, overlap=False, max_tokens=max_tokens, ways=ways))
    counts = [ways[number % len(ways)][1] for number in range(len(max_tokens))]
    assert [{len(top.token_ids) for _, _, top in found[bytes([n])]} for n in range(6)] == [{n} for n in counts]


@pytest.mark.parametrize("ways", [WAYS[:1], WAYS, WAYS[1:2]], ids=["greedy", "every way", "temperature"])
def test_no_step_waits_for_the_device_before_the_next_is_launched(ways: Sequence[Way]) -> None:
    """Of decode in its steady state: nothing but the end of the step before the last is ever waited for. What is drawn
    is one more replay."""
    engine = engine_of(gpu_model(small_config("bfloat16")), overlap=True, max_tokens=[200] * 4, ways=ways)
    replays = 1 if ways == WAYS[:1] else 2
    while engine.statistics().num_prefilling:
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(STEPS):
            engine.step()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    counts = Counter(event.name for event in events)
    assert counts["cudaGraphLaunch"] == replays * (STEPS + 1), counts
    waits = {name: count for name, count in counts.items() if "Synchronize" in name or name == "aten::item"}
    assert waits.pop("cudaEventSynchronize", 0) == STEPS, counts
    waits.pop("cudaDeviceSynchronize", None)  # the profiler's own, at its end
    assert not waits, counts
    assert not counts["cudaMemcpyAsync"], f"a step is a replay and nothing else: {counts}"
    assert not counts["cudaLaunchKernel"], counts
    assert launches_go_ahead([event.name for event in events], replays), (
        "a step was waited for before the next was launched"
    )


def launches_go_ahead(names: list[str], replays: int) -> bool:
    """At every wait more steps have been launched than are waited for, that one included."""
    launched = waited = 0
    for name in names:
        launched += name == "cudaGraphLaunch"
        waited += name == "cudaEventSynchronize"
        if name == "cudaEventSynchronize" and launched <= waited * replays:
            return False
    return True
