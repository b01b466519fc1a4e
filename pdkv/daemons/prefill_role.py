"""A prefill worker's bookkeeping: jobs of the front, requests of the engine, transfers of the agent."""

from collections.abc import Sequence

from pdkv.agent.events import (
    AbandonTransfer,
    DecodeAgentEvent,
    ExpectTransfer,
    FinishPrefill,
    GrantPages,
    PagesFreed,
    PrefillAgentEvent,
    PrefillWanted,
    RaiseWatermark,
    TransferEnded,
)
from pdkv.agent.loop import now
from pdkv.daemons import attachment
from pdkv.daemons.link import AbortJob, JobFinished, PrefillJob, ReleaseLease, ToEngine
from pdkv.daemons.roles import EngineParts, Role, job_failed, sampling_params
from pdkv.errors import FailureCode
from pdkv.m3.logprobs import PromptLogprobs
from pdkv.m3.requests import (
    EngineEvent,
    PagesReserved,
    PrefillFinished,
    PrefillProgress,
    PrefillRequest,
    PromptScored,
    RequestId,
    RequestRefused,
    singly,
)
from pdkv.schema import TransferId


class PrefillRole(Role):
    """A job is here until the front has its last message; its pages are the engine's until the agent frees them.

    An engine that has nothing else to do begins with a job before its Acquire has come: of one job at a time, and only
    where the longest prompt still finds room beside it. So nobody ever waits for pages of a job that waits for D.
    """

    def __init__(self, parts: EngineParts, block_size: int, max_model_len: int) -> None:
        self._parts = parts
        self._block_size = block_size
        self._most_blocks = -(-max_model_len // block_size)
        self._jobs: dict[TransferId, PrefillJob] = {}
        self._held: set[TransferId] = set()
        """Whose requests the engine has."""
        self._early: TransferId | None = None
        """One of them that the agent has not asked for yet."""
        self._early_done = False
        """It is computed. Its job stays, so that whoever gives up is heard."""
        self._scored: dict[TransferId, list[PromptLogprobs]] = {}
        """Of prompts that are being computed and scored."""

    def on_front(self, message: ToEngine, at: float) -> None:
        match message:
            case PrefillJob():
                transfer = TransferId(message.transfer)
                self._jobs[transfer] = message
                self._parts.post(ExpectTransfer(transfer, len(message.prompt), message.deadline_s))
                if self._may_begin(transfer, len(message.prompt)):
                    self._early, self._early_done = transfer, False
                    self._begin(transfer, message)
            case AbortJob(transfer=raw):
                self._parts.post(AbandonTransfer(TransferId(raw), FailureCode.CANCELLED, "the router gave up"))
            case ReleaseLease(transfer=raw):
                told = "an operator has released its lease"
                self._parts.post(AbandonTransfer(TransferId(raw), FailureCode.LEASE_EXPIRED, told))
            case _:
                raise AssertionError(f"a prefill worker's front sends no {type(message).__name__}")

    def on_agent(self, event: PrefillAgentEvent | DecodeAgentEvent) -> None:
        match event:
            case PrefillWanted(transfer=transfer) if transfer == self._early:
                self._early = None
                if self._early_done:
                    self._tell_finished(transfer)
            case PrefillWanted(transfer=transfer):
                self._start(transfer)
            case PagesFreed(transfer=transfer):
                self._release(transfer)
            case TransferEnded(transfer=transfer, code=code, message=message):
                if transfer == self._early:  # its pages may be unknown to the agent, and nobody else ever was told
                    self._release(transfer)
                if self._jobs.pop(transfer, None) is not None:
                    self._parts.send(job_failed(transfer, code or FailureCode.INTERNAL, message))
            case _:
                raise AssertionError(f"a prefill agent tells no {type(event).__name__}")

    def on_engine(self, events: Sequence[EngineEvent]) -> None:
        finished = {event.id for event in events if isinstance(event, PrefillFinished)}
        for event in singly(events):
            transfer = TransferId(event.id)
            match event:
                case PagesReserved(pages=pages, cached_tokens=cached):
                    self._parts.post(GrantPages(transfer, pages, cached))
                case PrefillProgress() if event.id in finished:
                    pass  # Done says as much, and all that is left is read in one go
                case PrefillProgress(tokens_done=tokens):
                    self._parts.post(RaiseWatermark(transfer, tokens, now()))
                case PromptScored(logprobs=logprobs):
                    self._scored[transfer].append(logprobs)
                case PrefillFinished():
                    self._parts.post(self._finished(event))
                    if transfer == self._early:
                        self._early_done = True
                    else:
                        self._tell_finished(transfer)
                case RequestRefused(message=message, never=never):
                    self._refuse(transfer, message, never=never)
                case _:
                    raise AssertionError(f"a prefill engine tells no {type(event).__name__}")

    def on_time(self, at: float) -> None:
        """Deadlines are the agent's: it tells when a transfer ends."""

    def on_step(self, at: float) -> None:
        """Only decode counts the time until a request's first step."""

    def _may_begin(self, transfer: TransferId, num_tokens: int) -> bool:
        engine = self._parts.engine
        if self._early is not None or transfer in self._held or engine.has_work:
            return False
        told = engine.statistics()
        num_blocks = -(-num_tokens // self._block_size)
        return not told.num_queued and told.num_pages_free >= num_blocks + self._most_blocks

    def _start(self, transfer: TransferId) -> None:
        job = self._jobs.get(transfer)
        if job is None:
            self._parts.post(AbandonTransfer(transfer, FailureCode.CANCELLED, "the request has ended"))
            return
        self._begin(transfer, job)

    def _begin(self, transfer: TransferId, job: PrefillJob) -> None:
        self._held.add(transfer)
        if job.prompt_top is not None:
            self._scored[transfer] = []
        request = PrefillRequest(
            id=RequestId(transfer),
            prompt=tuple(job.prompt),
            sampling=sampling_params(job.sampling),
            num_top=job.num_top,
            prompt_top=job.prompt_top,
        )
        self.on_engine(self._parts.engine.submit(request))

    def _release(self, transfer: TransferId) -> None:
        self._scored.pop(transfer, None)
        self._held.discard(transfer)
        if transfer == self._early:
            self._early = None
        self._parts.engine.release(RequestId(transfer))

    def _tell_finished(self, transfer: TransferId) -> None:
        if self._jobs.pop(transfer, None) is not None:
            self._parts.send(JobFinished(transfer, "prefilled"))

    def _finished(self, event: PrefillFinished) -> FinishPrefill:
        transfer = TransferId(event.id)
        scored = self._scored.pop(transfer, None)
        extras = attachment.FirstTokenExtras(event.top, None if scored is None else PromptLogprobs.join(scored))
        return FinishPrefill(transfer, event.token, event.logprob, attachment.encode(extras), now())

    def _refuse(self, transfer: TransferId, message: str, *, never: bool) -> None:
        self._release(transfer)
        code = FailureCode.INTERNAL if never else FailureCode.NO_CAPACITY
        if self._jobs.pop(transfer, None) is not None:
            self._parts.send(job_failed(transfer, code, message, 400 if never else None))
        self._parts.post(AbandonTransfer(transfer, code, message))
