"""The engine: schedule, run, postprocess; the same code prefills, decodes, and serves undivided."""

import torch

from pdkv.m3.logprobs import NO_TOP, TopLogprobs
from pdkv.m3.model import KvViews, M3Model, StepBatch
from pdkv.m3.requests import (
    EngineEvent,
    EngineRequest,
    EngineSettings,
    EngineStatistics,
    PromptScored,
    RequestId,
    RequestRefused,
)
from pdkv.m3.sampling import Sample, sample
from pdkv.m3.scheduler import NOT_FINITE, Run, Scheduler, TokenBounds
from pdkv.m3.scoring import score
from pdkv.memory.pages import PagePool


class Engine:
    """Serves requests from one model, one cache and one page pool, all owned by the calling thread.

    ``cache`` and the model live on one device. Nothing here knows where a prompt's state comes from: a
    ``DecodeRequest`` gets pages, somebody fills them, ``resume`` says that they are full.

    Every request that is not refused ends once: by ``RequestFinished``, or by the caller's ``release``.
    """

    def __init__(self, model: M3Model, cache: KvViews, pool: PagePool, settings: EngineSettings) -> None:
        self._model = model
        self._cache = cache
        self._num_steps = 0
        config = model.config
        self._scheduler = Scheduler(
            pool,
            settings,
            TokenBounds(
                block_size=config.block_size,
                vocab_size=config.vocab_size,
                eos_tokens=frozenset(config.eos_token_ids),
            ),
        )

    def submit(self, request: EngineRequest) -> list[EngineEvent]:
        """Take a request. Returns its refusal, or the reservations that are possible now, else nothing yet.

        Raises ``RequestError`` for an id that the engine holds already.
        """
        return self._scheduler.submit(request)

    def resume(self, request_id: RequestId, token: int, logprob: float, top: TopLogprobs = NO_TOP) -> list[EngineEvent]:
        """The state of a ``DecodeRequest``'s prompt is in its pages and ``token`` follows it: emit it and decode on.

        Finishes at once when that token is the last. Harmless for an id that the engine no longer holds.
        """
        return self._scheduler.resume(request_id, token, logprob, top)

    def release(self, request_id: RequestId) -> None:
        """Give back everything of a request at whatever stage. Idempotent; an unknown id is harmless.

        The caller vouches that nobody reads or writes the pages any more.
        """
        self._scheduler.release(request_id)

    @property
    def has_work(self) -> bool:
        """``step`` would do something now. False with requests queued means: until a release makes room."""
        return self._scheduler.can_run or self._scheduler.can_admit

    def step(self) -> list[EngineEvent]:
        """Run one batch; ``[]`` when idle.

        A step that finds room for queued requests returns at once, so that a reservation never waits for a batch.
        """
        admitted = self._scheduler.admit()
        if admitted:
            return admitted
        runs = self._scheduler.schedule()
        if not runs:
            return []
        samples, scored = self._run(runs)
        self._num_steps += 1
        return self._withhold(scored, [*scored.values(), *self._scheduler.complete(runs, samples)])

    def statistics(self) -> EngineStatistics:
        return self._scheduler.statistics(num_steps=self._num_steps)

    @torch.inference_mode()
    def _run(self, runs: list[Run]) -> tuple[list[Sample | None], dict[RequestId, PromptScored | RequestRefused]]:
        """What was chosen, one entry a run that wanted a token, and what was scored, by request."""
        device = self._model.device
        hidden = self._model.hidden(step_batch(runs, device), self._cache)  # [num_rows, hidden]
        rows = torch.split(hidden, [len(run.wanted_rows) for run in runs])
        choosing = [run for run in runs if run.sampling is not None]
        last = [rows[i][-1:] for i, run in enumerate(runs) if run.sampling is not None]
        samples = _choose(self._model.logits(torch.cat(last)), choosing) if choosing else []
        scored: dict[RequestId, PromptScored | RequestRefused] = {}
        for run, mine in zip(runs, rows, strict=True):
            if run.targets:
                found = score(self._model, mine[: len(run.targets)], run.targets, run.prompt_top)
                refused = RequestRefused(run.id, NOT_FINITE, never=False)
                scored[run.id] = PromptScored(run.id, found) if found is not None else refused
        if device.type != "cpu":
            # Whoever is told of progress may read the pages: the kernels that wrote them must have ended.
            torch.accelerator.current_stream(device).synchronize()
        return samples, scored

    def _withhold(
        self, scored: dict[RequestId, PromptScored | RequestRefused], events: list[EngineEvent]
    ) -> list[EngineEvent]:
        """A request whose prompt could not be scored ends with its refusal and nothing else."""
        refused = {event.id for event in scored.values() if isinstance(event, RequestRefused)}
        for request_id in refused:
            self._scheduler.release(request_id)
        return [event for event in events if event.id not in refused or event is scored[event.id]]


def _choose(logits: torch.Tensor, runs: list[Run]) -> list[Sample | None]:  # logits: float32 [num_runs, vocab]
    """The next token of each run; ``None`` where the logits are not finite, so that one damaged request harms only
    itself."""
    is_finite: list[bool] = logits.isfinite().all(dim=1).tolist()
    sound = [row for row, finite in enumerate(is_finite) if finite]
    params = [run.sampling for run in runs if run.sampling is not None]
    ends, num_top = [runs[row].end for row in sound], [runs[row].num_top for row in sound]
    chosen = iter(sample(logits[sound], [params[row] for row in sound], ends, num_top))
    return [next(chosen) if finite else None for finite in is_finite]


def step_batch(runs: list[Run], device: torch.device) -> StepBatch:
    """Lay the runs of one step end to end."""
    starts = [0]
    for run in runs:
        starts.append(starts[-1] + len(run.tokens))
    width = max(len(run.pages) for run in runs)
    return StepBatch(
        token_ids=torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(run.start, run.end, dtype=torch.int64) for run in runs]).to(device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([run.start for run in runs], dtype=torch.int32, device=device),
        page_table=torch.tensor(
            [run.pages + (-1,) * (width - len(run.pages)) for run in runs], dtype=torch.int32, device=device
        ),
        logits_rows=torch.tensor(
            [start + row for run, start in zip(runs, starts, strict=False) for row in run.wanted_rows],
            dtype=torch.int64,
            device=device,
        ),
    )
