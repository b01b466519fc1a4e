"""Decode steps launched before the last one's tokens are known, on a GPU: equal answers, and no wait in between."""

from collections import Counter

import torch
from torch.profiler import ProfilerActivity, profile

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestFinished, RequestId, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from tests.gpu.models import GPU, gpu_model, small_config

STEPS = 20
"""That are looked at, after those in which requests prefill and shapes are captured."""


def engine_of(model: M3Model, *, overlap: bool, max_tokens: list[int]) -> Engine:
    """With a request for each of ``max_tokens``, all of whose prompts are computed; graphs are captured."""
    settings = EngineSettings(max_model_len=1024, max_batch=8, overlap=overlap)
    num_pages = 8 * len(max_tokens)
    arena = Arena.allocate(RowLayout.of(kv_layout(model.config, "fp8", "fp8")), num_pages, GPU)
    runner = StepRunner(model, arena, DecodeShapes.of(settings, 128, num_pages))
    runner.prepare()
    engine = Engine(runner, PagePool(num_pages), settings)
    for number, count in enumerate(max_tokens):
        prompt = tuple((number * 31 + i * 7) % 380 for i in range(60 + 90 * number))
        request = CompleteRequest(
            id=RequestId(bytes([number])), prompt=prompt, max_tokens=count, sampling=SamplingParams(), ignore_eos=True
        )
        engine.submit(request)
    return engine


def answers(engine: Engine) -> dict[bytes, list[tuple[int, float]]]:
    told: dict[bytes, list[tuple[int, float]]] = {}
    ended = set()
    while engine.has_work:
        for event in singly(engine.step()):
            if isinstance(event, TokenGenerated):
                told.setdefault(event.id, []).append((event.token, event.logprob))
            elif isinstance(event, RequestFinished):
                ended.add(event.id)
    assert ended == told.keys()
    return told


def test_overlapped_steps_tell_the_same_bit_for_bit() -> None:
    model = gpu_model(small_config("bfloat16"))
    max_tokens = [40, 7, 23, 40, 1, 31]
    assert answers(engine_of(model, overlap=True, max_tokens=max_tokens)) == answers(
        engine_of(model, overlap=False, max_tokens=max_tokens)
    )


def test_no_step_waits_for_the_device_before_the_next_is_launched() -> None:
    """Of greedy decode in its steady state: nothing but the end of the step before the last is ever waited for."""
    engine = engine_of(gpu_model(small_config("bfloat16")), overlap=True, max_tokens=[200] * 4)
    while engine.statistics().num_prefilling:
        engine.step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as profiled:
        for _ in range(STEPS):
            engine.step()
    events = sorted(profiled.events(), key=lambda event: event.time_range.start)
    counts = Counter(event.name for event in events)
    assert counts["cudaGraphLaunch"] == STEPS + 1, counts
    waits = {name: count for name, count in counts.items() if "Synchronize" in name or name == "aten::item"}
    assert waits.pop("cudaEventSynchronize", 0) == STEPS, counts
    waits.pop("cudaDeviceSynchronize", None)  # the profiler's own, at its end
    assert not waits, counts
    assert not counts["cudaMemcpyAsync"], f"a step is a replay and nothing else: {counts}"
    assert not counts["cudaLaunchKernel"], counts
    assert launches_go_ahead([event.name for event in events]), "a step was waited for before the next was launched"


def launches_go_ahead(names: list[str]) -> bool:
    """At every wait more steps have been launched than are waited for, that one included."""
    launched = waited = 0
    for name in names:
        launched += name == "cudaGraphLaunch"
        waited += name == "cudaEventSynchronize"
        if name == "cudaEventSynchronize" and launched <= waited:
            return False
    return True
