"""The engine: schedule, run, postprocess; the same code prefills, decodes, and serves undivided."""

import torch

from pdkv.m3.model import KvViews, M3Model, StepBatch
from pdkv.m3.requests import EngineEvent, EngineRequest, EngineSettings, EngineStatistics, RequestId
from pdkv.m3.sampling import sample
from pdkv.m3.scheduler import Run, Sample, Scheduler, TokenBounds
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

    def resume(self, request_id: RequestId, token: int, logprob: float) -> list[EngineEvent]:
        """The state of a ``DecodeRequest``'s prompt is in its pages and ``token`` follows it: emit it and decode on.

        Finishes at once when that token is the last. Harmless for an id that the engine no longer holds.
        """
        return self._scheduler.resume(request_id, token, logprob)

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
        samples = self._run(runs)
        self._num_steps += 1
        return self._scheduler.complete(runs, samples)

    def statistics(self) -> EngineStatistics:
        return self._scheduler.statistics(num_steps=self._num_steps)

    @torch.inference_mode()
    def _run(self, runs: list[Run]) -> list[Sample | None]:
        device = self._model.device
        logits = self._model.forward(step_batch(runs, device), self._cache)  # [num_samples, vocab] float32
        samples = _choose(logits, [run for run in runs if run.sampling is not None])
        if device.type != "cpu":
            # Whoever is told of progress may read the pages: the kernels that wrote them must have ended.
            torch.accelerator.current_stream(device).synchronize()
        return samples


def _choose(logits: torch.Tensor, runs: list[Run]) -> list[Sample | None]:  # logits: float32 [num_runs, vocab]
    """The next token of each run; ``None`` where the logits are not finite, so that one damaged request harms only
    itself."""
    is_finite: list[bool] = logits.isfinite().all(dim=1).tolist()
    rows = [row for row, finite in enumerate(is_finite) if finite]
    params = [run.sampling for run in runs if run.sampling is not None]
    tokens, logprobs = sample(logits[rows], [params[row] for row in rows], [runs[row].end for row in rows])
    chosen = iter(zip(tokens, logprobs, strict=True))
    return [Sample(*next(chosen)) if finite else None for finite in is_finite]


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
            [end - 1 for run, end in zip(runs, starts[1:], strict=True) if run.sampling is not None],
            dtype=torch.int64,
            device=device,
        ),
    )
