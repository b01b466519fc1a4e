"""A decode worker's bookkeeping: jobs of the front, requests of the engine, transfers of the agent.

QUEUED --pages--> FETCHING --state arrived--> DECODING --last token--> gone
                      | failed or aborted
                  ABANDONED --pages returned--> gone
"""

import heapq
import time
from array import array
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple

import msgspec

from pdkv.agent.events import (
    AbandonTransfer,
    DecodeAgentEvent,
    PagesReturned,
    PrefillAgentEvent,
    StartTransfer,
    TransferArrived,
    TransferFacts,
    TransferFailed,
)
from pdkv.agent.loop import now
from pdkv.daemons import attachment
from pdkv.daemons.link import (
    AbortJob,
    DecodeJob,
    FinishJob,
    GroupTokens,
    JobFinished,
    StepTokens,
    ToEngine,
    TokensOut,
    TransferReport,
)
from pdkv.daemons.roles import EngineParts, Role, job_failed, sampling_params
from pdkv.errors import FailureCode, TransferError
from pdkv.m3.logprobs import PromptLogprobs
from pdkv.m3.requests import (
    DecodeRequest,
    EngineEvent,
    FinishReason,
    PagesReserved,
    RequestEvent,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
    TokensGenerated,
)
from pdkv.metric_table import FIRST_STEP_SECONDS
from pdkv.schema import Incarnation, TransferId


class Stage(Enum):
    QUEUED = "queued"
    FETCHING = "fetching"
    DECODING = "decoding"
    ABANDONED = "abandoned"
    """The front has had its last message; the pages are still written to."""


class _Job:
    def __init__(self, job: DecodeJob, at: float, number: int) -> None:
        self.job = msgspec.structs.replace(job, prompt=[])
        """Without the prompt, which the engine has: so many numbers take long to let go."""
        self.num_prompt_tokens = job.num_prompt_tokens
        self.number = number
        """Of all jobs of this worker's life."""
        self.deadline = at + job.deadline_s
        self.stage = Stage.QUEUED
        self.facts: TransferFacts | None = None
        """Once its state is here."""
        self.first_step_s: float | None = None
        self.prompt_logprobs: PromptLogprobs | None = None
        """Until they go to the front with the first token."""

    @property
    def report(self) -> TransferReport | None:
        """Made when it is told: the first token need not wait for it."""
        if self.facts is None:
            return None
        told = msgspec.convert(msgspec.structs.asdict(self.facts), TransferReport)
        resident_at = time.time() - (now() - self.facts.resident_at)
        return msgspec.structs.replace(told, first_step_s=self.first_step_s, resident_at=resident_at)

    @property
    def tells_more(self) -> bool:
        """Something goes to the front with its next token."""
        return bool(self.job.num_top) or self.prompt_logprobs is not None


class DecodeRole(Role):
    """Every job ends with one JobFinished or JobFailed to the front, and gives its pages back exactly once."""

    def __init__(self, parts: EngineParts, block_size: int) -> None:
        self._parts = parts
        self._block_size = block_size
        self._jobs: dict[TransferId, _Job] = {}
        self._resumed: dict[TransferId, float] = {}
        """Requests that no step has decoded yet: when their state was here, by the agent's clock."""
        self._now = 0.0
        self._num_jobs = 0
        self._told_ids: list[RequestId] | None = None
        """Whom the front knows by their places in a step."""
        self._deadlines: list[tuple[float, TransferId, int]] = []
        """A heap: of every job, also of those that are over; its number last."""

    def on_front(self, message: ToEngine, at: float) -> None:
        self._now = at
        match message:
            case DecodeJob():
                self._queue(message, at)
            case AbortJob(transfer=raw):
                self._give_up(TransferId(raw), FailureCode.CANCELLED, "the client or the router is gone")
            case FinishJob(transfer=raw):
                self._finish(TransferId(raw))
            case _:
                raise AssertionError(f"a decode worker's front sends no {type(message).__name__}")

    def on_agent(self, event: PrefillAgentEvent | DecodeAgentEvent) -> None:
        match event:
            case TransferArrived():
                self._on_arrived(event)
            case TransferFailed(transfer=transfer, code=code, message=message):
                job = self._jobs.get(transfer)
                if job is not None and job.stage is Stage.FETCHING:
                    job.stage = Stage.ABANDONED
                    self._parts.send(job_failed(transfer, code, message))
            case PagesReturned(transfer=transfer):
                self._forget(transfer)
            case _:
                raise AssertionError(f"a decode agent tells no {type(event).__name__}")

    def on_engine(self, events: Sequence[EngineEvent]) -> None:
        """All tokens go to the front first, in one message but for those that come with more than themselves. None of
        a job's comes behind its end."""
        if len(events) == 1 and isinstance(events[0], TokensGenerated):  # the commonest step
            self._tell_group(events[0])
            return
        tokens: list[TokenGenerated] = []
        others: list[RequestEvent] = []
        for event in events:
            if isinstance(event, TokensGenerated):
                self._tell_group(event)
            elif isinstance(event, TokenGenerated):
                tokens.append(event)
            else:
                others.append(event)
        if tokens:
            self._tell_each(tokens)
        for other in others:
            self._on_event(TransferId(other.id), other)

    def _tell_each(self, events: Sequence[TokenGenerated]) -> None:
        plain, rich = _Told([], [], []), dict[TransferId, list[TokenGenerated]]()
        for event in events:
            if self._jobs[TransferId(event.id)].tells_more:
                rich.setdefault(TransferId(event.id), []).append(event)
            else:
                plain.add(event)
        if plain.transfers:
            self._parts.send(StepTokens(tuple(plain.transfers), plain.tokens, plain.logprobs))
        for transfer, tokens in rich.items():
            self._send_tokens(transfer, tokens)

    def _tell_group(self, event: TokensGenerated) -> None:
        """Who they are is said when it changes."""
        transfers: list[bytes] | None = None
        if event.ids is not self._told_ids:
            self._told_ids = event.ids
            transfers = [*event.ids]
        tops = (b"", b"") if event.tops is None else event.tops.pack()
        self._parts.send(GroupTokens(transfers, event.tokens.tobytes(), event.logprobs.tobytes(), *tops))

    def _on_event(self, transfer: TransferId, event: RequestEvent) -> None:
        match event:
            case PagesReserved():
                self._fetch(transfer, event)
            case RequestFinished(reason=reason):
                job = self._jobs.pop(transfer)
                self._parts.send(JobFinished(transfer, reason.value, job.report))
            case RequestRefused(message=message, never=never):
                self._refuse(transfer, message, never=never)
            case _:
                raise AssertionError(f"a decode engine tells no {type(event).__name__}")

    def on_time(self, at: float) -> None:
        self._now = at
        while self._deadlines and self._deadlines[0][0] <= at:
            _, transfer, number = heapq.heappop(self._deadlines)
            job = self._jobs.get(transfer)
            if job is not None and job.number == number:  # the id may be another job's by now
                self._give_up(transfer, FailureCode.DEADLINE, "the request's deadline has passed")

    def on_step(self, at: float) -> None:
        for transfer, resident_at in self._resumed.items():
            waited_s = at - resident_at
            self._parts.meter.observe(FIRST_STEP_SECONDS, value=waited_s)
            self._jobs[transfer].first_step_s = waited_s
        self._resumed.clear()

    def _queue(self, message: DecodeJob, at: float) -> None:
        transfer = TransferId(message.transfer)
        if transfer in self._jobs:  # the state of an aborted try may still be on its way out
            self._parts.send(job_failed(transfer, FailureCode.INTERNAL, "this transfer id is in use", 409))
            return
        self._num_jobs += 1
        job = self._jobs[transfer] = _Job(message, at, self._num_jobs)
        heapq.heappush(self._deadlines, (job.deadline, transfer, job.number))
        request = DecodeRequest(
            id=RequestId(transfer),
            prompt=_packed(message.prompt),
            max_tokens=message.max_tokens,
            sampling=sampling_params(message.sampling),
            ignore_eos=message.ignore_eos,
            num_top=message.num_top,
        )
        self.on_engine(self._parts.engine.submit(request))

    def _fetch(self, transfer: TransferId, reserved: PagesReserved) -> None:
        """Ask for what the prefix cache lacks. The pages that it has are held already, so they stay."""
        job = self._jobs[transfer]
        job.stage = Stage.FETCHING
        num_tokens = job.num_prompt_tokens
        self._parts.post(
            StartTransfer(
                transfer=transfer,
                control=job.job.prefill_control,
                incarnation=Incarnation(job.job.prefill_incarnation),
                pages=reserved.pages[: -(-num_tokens // self._block_size)],
                num_tokens=num_tokens,
                deadline_s=max(0.0, job.deadline - self._now),
                resident_blocks=reserved.cached_tokens // self._block_size,
            )
        )

    def _on_arrived(self, event: TransferArrived) -> None:
        job = self._jobs[event.transfer]
        if job.stage is Stage.ABANDONED:  # given up in the moment in which it arrived
            self._forget(event.transfer)
            return
        job.stage = Stage.DECODING
        asked = job.job
        try:
            extras = attachment.decode(event.attachment, job.num_prompt_tokens, asked.num_top, asked.prompt_top)
        except TransferError as exc:
            self._give_up(event.transfer, exc.code, str(exc))
            return
        job.facts = event.facts
        job.prompt_logprobs = extras.prompt
        first = RequestId(event.transfer), event.token, event.logprob, extras.top
        self.on_engine(self._parts.engine.resume(*first))
        if event.transfer in self._jobs:  # the first token was not the last
            self._resumed[event.transfer] = event.facts.resident_at

    def _send_tokens(self, transfer: TransferId, tokens: Sequence[TokenGenerated]) -> None:
        """Those of one step together."""
        job = self._jobs[transfer]
        prompt, job.prompt_logprobs = job.prompt_logprobs, None
        top = [token.top for token in tokens] if job.job.num_top else []
        ids, logprobs = [token.token for token in tokens], [token.logprob for token in tokens]
        self._parts.send(TokensOut(transfer, ids, logprobs, top, prompt))

    def _finish(self, transfer: TransferId) -> None:
        """The front needs no more tokens; the job may have ended by itself meanwhile."""
        job = self._jobs.get(transfer)
        if job is not None and job.stage is Stage.DECODING:
            self._forget(transfer)
            self._parts.send(JobFinished(transfer, FinishReason.STOP.value, job.report))

    def _give_up(self, transfer: TransferId, code: FailureCode, message: str) -> None:
        job = self._jobs.get(transfer)
        if job is None or job.stage is Stage.ABANDONED:
            return
        self._parts.send(job_failed(transfer, code, message))
        if job.stage is Stage.FETCHING:
            job.stage = Stage.ABANDONED
            self._parts.post(AbandonTransfer(transfer, code, message))
        else:
            self._forget(transfer)

    def _refuse(self, transfer: TransferId, message: str, *, never: bool) -> None:
        """The engine holds nothing of the request any more."""
        job = self._jobs.pop(transfer)
        if job.stage is Stage.DECODING:
            self._parts.send(job_failed(transfer, FailureCode.INTERNAL, message))
        else:
            self._parts.send(job_failed(transfer, FailureCode.NO_CAPACITY, message, 400 if never else None))

    def _forget(self, transfer: TransferId) -> None:
        self._resumed.pop(transfer, None)
        if self._jobs.pop(transfer, None) is not None:
            self._parts.engine.release(RequestId(transfer))


class _Told(NamedTuple):
    """What is told of a step's tokens, entry by entry."""

    transfers: list[bytes]
    tokens: list[int]
    logprobs: list[float]

    def add(self, event: TokenGenerated) -> None:
        self.transfers.append(event.id)
        self.tokens.append(event.token)
        self.logprobs.append(event.logprob)


def _packed(tokens: list[int]) -> Sequence[int]:
    """As numbers of four bytes: thousands of Python's would be let go one by one when a request ends, beside a step.
    What does not fit is no token, which the engine finds."""
    try:
        return array("I", tokens)
    except OverflowError:
        return tokens
