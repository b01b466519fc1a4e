"""One request through one undivided engine with an arena of its own: the answer that every other path must give."""

from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import msgspec

from pdkv.errors import RequestError
from pdkv.m3.config import IndexScheduleOverride, kv_layout
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestId, RequestRefused, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout


class Answer(msgspec.Struct, frozen=True):
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Natural logarithms, one a token."""
    seconds: float
    """From submission to the last token; loading the model is not counted."""


class CacheOptions(msgspec.Struct, frozen=True):
    """How state is stored, and which layers select; ``auto`` and None: as the checkpoint says."""

    kv_dtype: str = "auto"
    index_dtype: str = "auto"
    schedule: IndexScheduleOverride | None = None


class LocalWorker(msgspec.Struct, frozen=True):
    """An engine with its arena, owned by the calling thread. No page is reserved for a probe: nobody connects."""

    engine: Engine
    arena: Arena
    runner: StepRunner


def local_worker(
    model: M3Model, num_pages: int, settings: EngineSettings, kv_dtype: str = "auto", index_dtype: str = "auto"
) -> LocalWorker:
    """A worker on the model's device. ``auto``: state is stored in the model's dtype."""
    layout = RowLayout.of(kv_layout(model.config, kv_dtype, index_dtype))
    arena = Arena.allocate(layout, num_pages, model.device)
    shapes = DecodeShapes.of(settings, model.config.block_size, num_pages)
    runner = StepRunner(model, arena, shapes, always_shaped=settings.batch_invariant)
    return LocalWorker(Engine(runner, PagePool(num_pages), settings), arena, runner)


def complete(
    model_dir: Path,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams | None = None,
    *,
    ignore_eos: bool = False,
    device: str = "cpu",
    dtype: str = "auto",
    cache: CacheOptions | None = None,
) -> Answer:
    """Load a checkpoint and answer one prompt with it. Raises ``RequestError`` for a request that cannot be served."""
    cache = cache or CacheOptions()
    model = load_model(model_dir, device=device, dtype=dtype, schedule=cache.schedule)
    stored = (cache.kv_dtype, cache.index_dtype)
    return complete_with(model, prompt, max_tokens, sampling, ignore_eos=ignore_eos, stored=stored)


def complete_with(
    model: M3Model,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: SamplingParams | None = None,
    *,
    ignore_eos: bool = False,
    prefill_chunk: int = 512,
    stored: tuple[str, str] = ("auto", "auto"),
) -> Answer:
    """The same with a model that is loaded already. ``stored``: dtypes of K/V and of index keys."""
    num_tokens = max(1, len(prompt) + max_tokens)
    settings = EngineSettings(max_model_len=model.config.max_position_embeddings, prefill_chunk=prefill_chunk)
    if num_tokens > settings.max_model_len:  # before an arena is made that may not fit the machine
        raise RequestError(
            f"{len(prompt)} prompt tokens and {max_tokens} to generate exceed the context of {settings.max_model_len}"
        )
    num_pages = -(-num_tokens // model.config.block_size)
    engine = local_worker(model, num_pages, settings, *stored).engine
    request = CompleteRequest(
        id=RequestId(b"undivided"),
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        sampling=sampling or SamplingParams(),
        ignore_eos=ignore_eos,
    )
    started = perf_counter()
    events = engine.submit(request)
    while engine.has_work:
        events += engine.step()
    seconds = perf_counter() - started
    for event in events:
        if isinstance(event, RequestRefused):
            raise RequestError(event.message)
    generated = [event for event in singly(events) if isinstance(event, TokenGenerated)]
    return Answer(
        token_ids=tuple(event.token for event in generated),
        logprobs=tuple(event.logprob for event in generated),
        seconds=seconds,
    )
