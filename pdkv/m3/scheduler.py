"""The scheduler: who holds pages and who runs in the next step; numbers only, never a tensor."""

from collections import deque
from enum import Enum
from itertools import islice

import msgspec

from pdkv.errors import RequestError
from pdkv.m3.logprobs import NO_TOP, TopLogprobs
from pdkv.m3.requests import (
    DecodeRequest,
    EngineEvent,
    EngineRequest,
    EngineSettings,
    EngineStatistics,
    FinishReason,
    PagesReserved,
    PrefillFinished,
    PrefillProgress,
    PrefillRequest,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
)
from pdkv.m3.sampling import Sample, SamplingParams
from pdkv.memory.pages import PagePool

NOT_FINITE = "the model's output is not finite: the checkpoint, or the state that the request attends to, is damaged"


class TokenBounds(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler must know of the model."""

    block_size: int
    vocab_size: int
    eos_tokens: frozenset[int]


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Part of one step: compute ``tokens`` of one request at positions ``start``, ``start + 1``, ..."""

    id: RequestId
    tokens: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    """Pages of the blocks up to and with the last of ``tokens``."""
    sampling: SamplingParams | None
    """How to choose the token after the last one; ``None`` when none is wanted yet."""
    num_top: int = 0
    """Likeliest tokens to tell with the chosen one."""
    targets: tuple[int, ...] = ()
    """Prompt tokens to score: they follow the first ``len(targets)`` of ``tokens``."""
    prompt_top: int = 0
    """Likeliest tokens to tell with each of ``targets``."""

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    @property
    def wanted_rows(self) -> tuple[int, ...]:
        """Which of ``tokens`` the model's output is wanted for: those to score, then the last if a token is chosen."""
        return (*range(len(self.targets)), *([len(self.tokens) - 1] if self.sampling is not None else []))


class _Stage(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HOLDING = "holding"
    WAITING_FOR_STATE = "waiting_for_state"
    DECODING = "decoding"


class _Sequence:
    """One request that is not over. Owned by the scheduler."""

    __slots__ = ("last_token", "num_computed", "num_generated", "pages", "request", "stage")

    def __init__(self, request: EngineRequest) -> None:
        self.request = request
        self.stage = _Stage.QUEUED
        self.pages: tuple[int, ...] = ()
        self.num_computed = 0
        self.num_generated = 0
        self.last_token = -1

    def next_run(self, budget: int, block_size: int) -> Run:
        """The last generated token, or up to ``budget`` tokens of a prompt that is not computed yet."""
        request = self.request
        tokens: tuple[int, ...]
        targets: tuple[int, ...] = ()
        prompt_top = 0
        if self.stage is _Stage.DECODING or isinstance(request, DecodeRequest):
            tokens, wants_sample = (self.last_token,), True
        else:
            tokens = request.prompt[self.num_computed : self.num_computed + budget]
            wants_sample = self.num_computed + len(tokens) == len(request.prompt)
            if request.prompt_top is not None:
                targets = request.prompt[self.num_computed + 1 : self.num_computed + len(tokens) + 1]
                prompt_top = request.prompt_top
        num_blocks = -(-(self.num_computed + len(tokens)) // block_size)
        return Run(
            id=request.id,
            tokens=tokens,
            start=self.num_computed,
            pages=self.pages[:num_blocks],
            sampling=request.sampling if wants_sample else None,
            num_top=request.num_top if wants_sample else 0,
            targets=targets,
            prompt_top=prompt_top,
        )

    def finish_reason(self, eos_tokens: frozenset[int]) -> FinishReason | None:
        request = self.request
        assert not isinstance(request, PrefillRequest)
        if self.last_token in eos_tokens and not request.ignore_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if self.num_generated >= request.max_tokens else None


class Scheduler:
    """Continuous batching without preemption. Owned by the engine thread, as is the pool.

    Pages for a request's whole need are reserved before anything of it runs, strictly in order of arrival: while the
    oldest queued request does not fit, younger ones wait behind it, so a big one is never starved. What runs
    therefore always can finish, and what can never fit is refused on arrival.
    """

    def __init__(self, pool: PagePool, settings: EngineSettings, bounds: TokenBounds) -> None:
        self._pool = pool
        self._settings = settings
        self._bounds = bounds
        self._sequences: dict[RequestId, _Sequence] = {}
        # Insertion order is order of arrival in that stage.
        self._queue: deque[RequestId] = deque()
        self._prefilling: dict[RequestId, _Sequence] = {}
        self._decoding: dict[RequestId, _Sequence] = {}

    def submit(self, request: EngineRequest) -> list[EngineEvent]:
        """Queue a request, or refuse it. Raises ``RequestError`` for an id that is in use."""
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id.hex()} is in use", param="id", status=409)
        problem = _refusal(request, self._settings.max_model_len, self._bounds.vocab_size)
        if not problem and self._num_pages(request) > self._pool.num_usable:
            problem = (
                f"{self._num_pages(request)} pages needed, the arena has {self._pool.num_usable}; give it more pages"
            )
        if problem:
            return [RequestRefused(request.id, problem, never=True)]
        if len(self._queue) >= self._settings.max_queued:
            return [RequestRefused(request.id, f"{len(self._queue)} requests are waiting for pages", never=False)]
        self._sequences[request.id] = _Sequence(request)
        self._queue.append(request.id)
        return self.admit()

    def admit(self) -> list[EngineEvent]:
        """Reserve pages for queued requests, oldest first, while they fit."""
        events: list[EngineEvent] = []
        while self.can_admit:
            sequence = self._sequences[self._queue.popleft()]
            request = sequence.request
            sequence.pages = self._pool.reserve(self._num_pages(request))
            if isinstance(request, DecodeRequest):
                sequence.stage = _Stage.WAITING_FOR_STATE
            else:
                sequence.stage = _Stage.PREFILLING
                self._prefilling[request.id] = sequence
            events.append(PagesReserved(request.id, sequence.pages))
        return events

    def resume(self, request_id: RequestId, token: int, logprob: float, top: TopLogprobs = NO_TOP) -> list[EngineEvent]:
        """Start a decode whose prompt state is resident. Harmless for an id that is gone."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        request = sequence.request
        assert isinstance(request, DecodeRequest), f"resume of a {type(request).__name__}"
        assert sequence.stage is _Stage.WAITING_FOR_STATE, f"resume of a request that is {sequence.stage.value}"
        if not 0 <= token < self._bounds.vocab_size:
            self.release(request_id)
            message = f"first token {token} is outside the vocabulary of {self._bounds.vocab_size}"
            return [RequestRefused(request_id, message, never=True), *self.admit()]
        sequence.num_computed = request.num_prompt_tokens
        events = self._accept(sequence, Sample(token, logprob, top))
        return events + self.admit()

    def release(self, request_id: RequestId) -> None:
        """Forget a request at whatever stage and free its pages. Idempotent; never called during a step."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if sequence.stage is _Stage.QUEUED:
            self._queue.remove(request_id)
        self._prefilling.pop(request_id, None)
        self._decoding.pop(request_id, None)
        if sequence.pages:
            self._pool.free(sequence.pages)

    def schedule(self) -> list[Run]:
        """The next step: every decode that has a slot, then one chunk budget of prompt tokens. Changes nothing."""
        block_size = self._bounds.block_size
        decoding = islice(self._decoding.values(), self._settings.max_batch)
        runs = [sequence.next_run(1, block_size) for sequence in decoding]
        budget = self._settings.prefill_chunk
        for sequence in self._prefilling.values():
            if budget == 0:
                break
            run = sequence.next_run(budget, block_size)
            budget -= len(run.tokens)
            runs.append(run)
        return runs

    def complete(self, runs: list[Run], samples: list[Sample | None]) -> list[EngineEvent]:
        """Account for a step: ``samples`` of the runs that wanted one, in order; ``None`` ends the request."""
        events: list[EngineEvent] = []
        chosen = iter(samples)
        for run in runs:
            sequence = self._sequences[run.id]
            sequence.num_computed = run.end
            if sequence.stage is _Stage.PREFILLING:
                events.append(PrefillProgress(run.id, run.end))
            if run.sampling is not None:
                events.extend(self._accept(sequence, next(chosen)))
        assert not list(chosen), "more samples than runs that wanted one"
        return events + self.admit()

    @property
    def can_admit(self) -> bool:
        """The oldest queued request fits now."""
        return bool(self._queue) and self._pool.can_reserve(self._num_pages(self._sequences[self._queue[0]].request))

    @property
    def can_run(self) -> bool:
        return bool(self._prefilling or self._decoding)

    def statistics(self, num_steps: int = 0) -> EngineStatistics:
        stages = [sequence.stage for sequence in self._sequences.values()]
        return EngineStatistics(
            num_queued=len(self._queue),
            num_prefilling=len(self._prefilling),
            num_holding=stages.count(_Stage.HOLDING),
            num_waiting_for_state=stages.count(_Stage.WAITING_FOR_STATE),
            num_decoding=len(self._decoding),
            num_pages_usable=self._pool.num_usable,
            num_pages_free=self._pool.num_free,
            num_steps=num_steps,
        )

    def _num_pages(self, request: EngineRequest) -> int:
        return -(-_num_cached_tokens(request) // self._bounds.block_size)

    def _accept(self, sequence: _Sequence, sample: Sample | None) -> list[EngineEvent]:
        """Take a generated token: tell it, then go on, hold or finish."""
        request = sequence.request
        if sample is None:
            self.release(request.id)
            return [RequestRefused(request.id, NOT_FINITE, never=False)]
        sequence.last_token = sample.token
        sequence.num_generated += 1
        self._prefilling.pop(request.id, None)
        if isinstance(request, PrefillRequest):
            sequence.stage = _Stage.HOLDING
            return [PrefillFinished(request.id, sample.token, sample.logprob, sample.top)]
        event = TokenGenerated(request.id, sample.token, sample.logprob, sample.top)
        reason = sequence.finish_reason(self._bounds.eos_tokens)
        if reason is None:
            sequence.stage = _Stage.DECODING
            self._decoding[request.id] = sequence
            return [event]
        self.release(request.id)
        return [event, RequestFinished(request.id, reason)]


def _refusal(request: EngineRequest, max_model_len: int, vocab_size: int) -> str:
    """Why the request can never be served whatever the pool, or the empty string."""
    if isinstance(request, DecodeRequest):
        num_prompt = request.num_prompt_tokens
    else:
        num_prompt = len(request.prompt)
        bad = next((token for token in request.prompt if not 0 <= token < vocab_size), None)
        if bad is not None:
            return f"prompt token {bad} is outside the vocabulary of {vocab_size}"
    num_generated = 1 if isinstance(request, PrefillRequest) else request.max_tokens
    if num_prompt < 1:
        return "the prompt is empty"
    if num_generated < 1:
        return f"max_tokens must be at least 1, not {num_generated}"
    if num_prompt + num_generated > max_model_len:
        return f"{num_prompt} prompt tokens and {num_generated} to generate exceed the context of {max_model_len}"
    return ""


def _num_cached_tokens(request: EngineRequest) -> int:
    """Tokens whose state the request may ever hold."""
    if isinstance(request, PrefillRequest):
        return len(request.prompt)
    num_prompt = request.num_prompt_tokens if isinstance(request, DecodeRequest) else len(request.prompt)
    return num_prompt + request.max_tokens
