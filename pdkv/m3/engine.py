"""The engine: schedule, run, postprocess; the same code prefills, decodes, and serves undivided."""

import msgspec

from pdkv.m3.logprobs import NO_TOP, TopLogprobs
from pdkv.m3.requests import (
    EngineEvent,
    EngineRequest,
    EngineSettings,
    EngineStatistics,
    PromptScored,
    RequestId,
    RequestRefused,
    singly,
)
from pdkv.m3.run import Step, TokenBounds
from pdkv.m3.scheduler import Scheduler
from pdkv.m3.step import Runner, StepInFlight
from pdkv.memory.pages import PagePool


class _Flight(msgspec.Struct, frozen=True):
    asked: Step
    step: StepInFlight


class Engine:
    """Serves requests from one runner (model and cache) and one page pool, all owned by the calling thread.

    Nothing here knows where a prompt's state comes from: a ``DecodeRequest`` gets pages, somebody fills them,
    ``resume`` says that they are full.

    Where the runner can, the step behind is launched before anybody waits for the one in flight: while the device
    computes, the host accounts for the step before. What a step chose is told one step later then, and nothing else
    differs.

    Every request that is not refused ends once: by ``RequestFinished``, or by the caller's ``release``.
    """

    def __init__(self, runner: Runner, pool: PagePool, settings: EngineSettings) -> None:
        self._runner = runner
        self._overlaps = settings.overlap and runner.overlaps
        self._in_flight: _Flight | None = None
        """Launched behind the last step that was waited for."""
        self._num_steps = 0
        config = runner.config
        self._scheduler = Scheduler(
            pool,
            msgspec.structs.replace(settings, overlap=self._overlaps),
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

        The caller vouches that nobody else reads or writes the pages any more. What a step in flight writes to is free
        when that step has ended.
        """
        self._scheduler.release(request_id)

    def empty_cache(self) -> None:
        """Let no later request use what earlier ones computed, and keep no page of those that run."""
        self._scheduler.empty_cache()

    @property
    def has_work(self) -> bool:
        """``step`` would do something now. False with requests queued means: until a release makes room."""
        return self._in_flight is not None or self._scheduler.can_run or self._scheduler.can_admit

    def step(self) -> list[EngineEvent]:
        """Run one batch, or wait for one that runs; ``[]`` when idle.

        A step that finds room for queued requests returns at once, so that a reservation never waits for a batch.
        """
        admitted = self._scheduler.admit()
        if admitted:
            return admitted
        flight = self._in_flight or self._launch()
        if flight is None:
            return []
        self._in_flight = self._launch() if self._overlaps else None
        samples, scored = flight.step.wait()
        self._num_steps += 1
        events = self._scheduler.complete(flight.asked, samples)
        return self._withhold(scored, [*scored.values(), *events]) if scored else events

    def _launch(self) -> _Flight | None:
        step = self._scheduler.schedule()
        return _Flight(step, self._runner.launch(step)) if step else None

    def statistics(self) -> EngineStatistics:
        return self._scheduler.statistics(num_steps=self._num_steps)

    def _withhold(
        self, scored: dict[RequestId, PromptScored | RequestRefused], events: list[EngineEvent]
    ) -> list[EngineEvent]:
        """A request whose prompt could not be scored ends with its refusal and nothing else."""
        refused = {event.id for event in scored.values() if isinstance(event, RequestRefused)}
        for request_id in refused:
            self._scheduler.release(request_id)
            self._scheduler.empty_cache()
        return [event for event in singly(events) if event.id not in refused or event is scored[event.id]]
