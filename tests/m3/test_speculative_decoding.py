"""Several query tokens a step on a real model: the answers of plain decoding, and no trace of what was rejected."""

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from pdkv.m3.config import IndexScheduleOverride
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.prefix_cache import BlockNames
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestFinished, RequestId, TokenGenerated
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.pages import PagePool
from pdkv.verify.undivided import LocalWorker, local_worker
from tests.soak import write_tiny_checkpoint

BLOCK = 128
SEED = b"seed"
WARM = SamplingParams(temperature=0.4, seed=11)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


@dataclass(frozen=True)
class Told:
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[tuple[int, ...], ...]


def prompts(count: int) -> list[tuple[int, ...]]:
    """Of many lengths; every second one goes round in a circle."""
    rng = random.Random(5)
    made = []
    for number in range(count):
        length = rng.randrange(2, 420)
        period = length if number % 2 else rng.randrange(1, 7)
        made.append(tuple(([rng.randrange(3, 320) for _ in range(period)] * length)[:length]))
    return made


def requests(sampling: SamplingParams, count: int = 6, max_tokens: int = 40) -> list[CompleteRequest]:
    return [
        CompleteRequest(
            id=RequestId(b"%d" % number), prompt=prompt, max_tokens=max_tokens, sampling=sampling, num_top=3
        )
        for number, prompt in enumerate(prompts(count))
    ]


def worker(model: M3Model, drafts: int, kv_dtype: str = "auto", index_dtype: str = "auto") -> LocalWorker:
    """Full of NaN, so that whatever is read before it is written shows."""
    settings = EngineSettings(
        max_model_len=600, prefill_chunk=200, max_batch=4, prefix_seed=SEED, speculative_tokens=drafts
    )
    made = local_worker(model, 24, settings, kv_dtype, index_dtype)
    poison(made, list(range(24)), 0)
    return made


def poison(made: LocalWorker, pages: list[int], first: int) -> None:
    """Fill every region of these pages with NaN from row ``first`` of the first of them on."""
    for spec in made.arena.layout.kv.specs:
        view = made.arena.view(spec.name, spec.layer)
        token_axis = 1 if spec.name == "index_k" else 2
        for page in pages:
            start = first if page == pages[0] else 0
            rows = view[page].narrow(token_axis - 1, start, BLOCK - start)
            if rows.dtype.itemsize == 1:
                rows.view(torch.uint8).fill_(0x7F)  # NaN of e4m3 and of e5m2
            else:
                rows.fill_(torch.nan)


def run(engine: Engine, asked: list[CompleteRequest]) -> dict[RequestId, Told]:
    events = [event for request in asked for event in engine.submit(request)]
    while engine.has_work:
        events += engine.step()
    told = {}
    for request in asked:
        mine = [event for event in events if isinstance(event, TokenGenerated) and event.id == request.id]
        assert sum(isinstance(event, RequestFinished) and event.id == request.id for event in events) == 1
        told[request.id] = Told(
            tuple(event.token for event in mine),
            tuple(event.logprob for event in mine),
            tuple(event.top.token_ids for event in mine),
        )
    return told


@pytest.fixture(scope="module", params=[SamplingParams(), WARM], ids=["greedy", "sampled"])
def decoded(request: pytest.FixtureRequest, model: M3Model) -> tuple[list[CompleteRequest], dict[RequestId, Told]]:
    """What is asked in a way of sampling, and what plain decoding answers."""
    asked = requests(request.param)
    return asked, run(worker(model, 0).engine, asked)


@pytest.mark.parametrize("drafts", [1, 4])
def test_answers_are_those_of_plain_decoding(
    model: M3Model, decoded: tuple[list[CompleteRequest], dict[RequestId, Told]], drafts: int
) -> None:
    asked, plain = decoded
    engine = worker(model, drafts).engine
    fast = run(engine, asked)
    for request in asked:
        assert fast[request.id].tokens == plain[request.id].tokens
        assert fast[request.id].logprobs == pytest.approx(plain[request.id].logprobs, abs=1e-4)
        assert fast[request.id].tops == plain[request.id].tops
    statistics = engine.statistics()
    if asked[0].sampling.temperature == 0:
        assert statistics.num_drafts_accepted > 0
    assert statistics.num_drafts > statistics.num_drafts_accepted, "some were rejected"
    assert statistics.num_pages_free == 24


def test_an_accepted_token_saves_a_step(model: M3Model) -> None:
    saved = 0
    for request in requests(SamplingParams(), count=4):
        slow, fast = worker(model, 0).engine, worker(model, 4).engine
        assert run(slow, [request])[request.id].tokens == run(fast, [request])[request.id].tokens
        accepted = fast.statistics().num_drafts_accepted
        assert slow.statistics().num_steps - fast.statistics().num_steps == accepted
        saved += accepted
    assert saved > 0


def test_layers_that_reuse_a_selection_do_so_row_by_row(checkpoint: Path) -> None:
    model = load_model(checkpoint, schedule=IndexScheduleOverride(topk_freq=2))
    assert any(model.config.reusing_layers)
    asked = requests(SamplingParams())
    plain, fast = run(worker(model, 0).engine, asked), run(worker(model, 3).engine, asked)
    assert {id_: told.tokens for id_, told in fast.items()} == {id_: told.tokens for id_, told in plain.items()}


@pytest.mark.parametrize("stored", [("auto", "auto"), ("fp8", "fp8")], ids=["float32", "fp8"])
def test_rejected_tokens_leave_no_trace(model: M3Model, stored: tuple[str, str]) -> None:
    """What a step stored beyond the accepted tokens is destroyed after every step, in every kind of region. The answer
    is the same bit for bit, and nothing destroyed is in the prefix cache."""
    (asked,) = [request for request in requests(SamplingParams(), max_tokens=100) if len(request.prompt) > 300][:1]
    untouched = run(worker(model, 4, *stored).engine, [asked])[asked.id]
    made = worker(model, 4, *stored)
    pool = PagePool(24)
    settings = EngineSettings(max_model_len=600, prefill_chunk=200, prefix_seed=SEED, speculative_tokens=4)
    engine = Engine(StepRunner(model, made.arena), pool, settings)
    (reserved,) = engine.submit(asked)
    generated: list[TokenGenerated] = []
    while engine.has_work:
        generated += [event for event in engine.step() if isinstance(event, TokenGenerated)]
        if generated:
            num_computed = len(asked.prompt) + len(generated) - 1
            poison(made, list(reserved.pages[num_computed // BLOCK :]), num_computed % BLOCK)
    assert engine.statistics().num_drafts > engine.statistics().num_drafts_accepted
    assert tuple(event.token for event in generated) == untouched.tokens
    assert tuple(event.logprob for event in generated) == untouched.logprobs
    tokens = [*asked.prompt, *untouched.tokens]
    kept = pool.find(BlockNames(SEED, BLOCK).first((len(tokens) - 1) // BLOCK, tokens))
    assert kept == reserved.pages[: (len(tokens) - 1) // BLOCK]
    assert pool.statistics().num_kept == len(kept)
    for spec in made.arena.layout.kv.specs:
        assert not made.arena.view(spec.name, spec.layer)[list(kept)].float().isnan().any(), spec.name
