"""The engine: schedule, run, postprocess; the same code prefills, decodes, and serves undivided."""

from pdkv.m3.logprobs import NO_TOP, TopLogprobs
from pdkv.m3.requests import (
    EngineEvent,
    EngineRequest,
    EngineSettings,
    EngineStatistics,
    PromptScored,
    RequestId,
    RequestRefused,
)
from pdkv.m3.run import TokenBounds
from pdkv.m3.scheduler import Scheduler
from pdkv.m3.step import Runner
from pdkv.memory.pages import PagePool


class Engine:
    """Serves requests from one runner (model and cache) and one page pool, all owned by the calling thread.

    Nothing here knows where a prompt's state comes from: a ``DecodeRequest`` gets pages, somebody fills them,
    ``resume`` says that they are full.

    Every request that is not refused ends once: by ``RequestFinished``, or by the caller's ``release``.
    """

    def __init__(self, runner: Runner, pool: PagePool, settings: EngineSettings) -> None:
        self._runner = runner
        self._num_steps = 0
        config = runner.config
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

    def empty_cache(self) -> None:
        """Let no later request use what earlier ones computed, and keep no page of those that run."""
        self._scheduler.empty_cache()

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
        samples, scored = self._runner.run(runs)
        self._num_steps += 1
        return self._withhold(scored, [*scored.values(), *self._scheduler.complete(runs, samples)])

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
        return [event for event in events if event.id not in refused or event is scored[event.id]]
