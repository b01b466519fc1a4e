"""What a decode answers when one region of the transferred state is lost: the proof that a chain hangs on all of it."""

from collections.abc import Sequence

import msgspec

from pdkv.m3.model import M3Model
from pdkv.m3.requests import (
    DecodeRequest,
    EngineSettings,
    PagesReserved,
    PrefillFinished,
    PrefillRequest,
    RequestId,
    TokenGenerated,
    singly,
)
from pdkv.m3.sampling import SamplingParams
from pdkv.memory.arena import Arena
from pdkv.schema import RegionKey, Shard
from pdkv.verify.undivided import local_worker

_PREFILL = RequestId(b"prefill")


class PrefilledPrompt(msgspec.Struct, frozen=True):
    """A prompt whose state lies in ``pages`` of an arena that nothing else writes to."""

    arena: Arena
    pages: tuple[int, ...]
    tokens: tuple[int, ...]
    token: int
    """The first generated one."""
    logprob: float


def prefill(
    model: M3Model, prompt: Sequence[int], prefill_chunk: int = 512, stored: tuple[str, str] = ("auto", "auto")
) -> PrefilledPrompt:
    """Compute a prompt in an engine with an arena of its own, greedily, and keep its state. ``stored``: dtypes of K/V
    and of index keys."""
    settings = EngineSettings(max_model_len=len(prompt) + 1, prefill_chunk=prefill_chunk)
    worker = local_worker(model, -(-len(prompt) // model.config.block_size), settings, *stored)
    events = worker.engine.submit(PrefillRequest(id=_PREFILL, prompt=tuple(prompt), sampling=SamplingParams()))
    while worker.engine.has_work:
        events += worker.engine.step()
    (reserved,) = (event for event in events if isinstance(event, PagesReserved))
    (finished,) = (event for event in events if isinstance(event, PrefillFinished))
    return PrefilledPrompt(
        arena=worker.arena,
        pages=reserved.pages,
        tokens=tuple(prompt),
        token=finished.token,
        logprob=finished.logprob,
    )


def region_keys(arena: Arena) -> list[RegionKey]:
    """Everything that can be lost: each region of each layer and head."""
    return [RegionKey(name=r.name, layer=r.layer, head=r.head_start) for r in arena.regions()]


def copy_state(source: PrefilledPrompt, arena: Arena, pages: Sequence[int], lost: RegionKey | None = None) -> None:
    """Copy a prompt's pages into the first of ``pages``, in block order, and zero what is lost."""
    count = len(source.pages)
    for spec in arena.layout.kv.specs:
        target = arena.view(spec.name, spec.layer)
        target[list(pages[:count])] = source.arena.view(spec.name, spec.layer)[list(source.pages)]
        if lost is not None and (spec.name, spec.layer) == (lost.name, lost.layer):
            for page in pages[:count]:
                (target[page, lost.head] if spec.shard is Shard.BY_HEAD else target[page]).zero_()


def first_wrong_steps(
    model: M3Model,
    source: PrefilledPrompt,
    expected: Sequence[int],
    losses: Sequence[RegionKey | None],
    *,
    concurrency: int = 8,
    stored: tuple[str, str] = ("auto", "auto"),
) -> dict[RegionKey | None, int | None]:
    """For each loss the first generated token that differs from ``expected``, or ``None`` if none does.

    All decodes run in one engine, ``concurrency`` at a time; one that has gone wrong makes room for the next.
    """
    num_tokens = len(source.tokens) + len(expected)
    num_pages = concurrency * -(-num_tokens // model.config.block_size)
    settings = EngineSettings(max_model_len=num_tokens, max_batch=concurrency)
    worker = local_worker(model, num_pages, settings, *stored)
    engine = worker.engine
    loss_of = {RequestId(b"%d" % number): loss for number, loss in enumerate(losses)}
    num_right = dict.fromkeys(loss_of, 0)
    wrong: dict[RegionKey | None, int | None] = dict.fromkeys(losses)
    events = [event for request_id in loss_of for event in engine.submit(_decode(request_id, source, len(expected)))]
    while events or engine.has_work:
        if not events:
            events = list(singly(engine.step()))
            continue
        event = events.pop(0)
        if isinstance(event, PagesReserved):
            copy_state(source, worker.arena, event.pages, loss_of[event.id])
            events += engine.resume(event.id, source.token, source.logprob)
        elif isinstance(event, TokenGenerated) and event.token == expected[num_right[event.id]]:
            num_right[event.id] += 1
        elif isinstance(event, TokenGenerated):
            wrong[loss_of[event.id]] = num_right[event.id]
            engine.release(event.id)
    return wrong


def _decode(request_id: RequestId, source: PrefilledPrompt, max_tokens: int) -> DecodeRequest:
    return DecodeRequest(
        id=request_id,
        prompt=source.tokens,
        max_tokens=max_tokens,
        sampling=SamplingParams(),
        ignore_eos=True,
    )
