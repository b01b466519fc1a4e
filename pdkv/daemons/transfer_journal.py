"""Follows every transfer through an engine process: one log line a change of state, and how long each took.

It listens at the borders (what front and agent say, what is said to them), so the roles need not know of it.
"""

import logging
import time
from collections.abc import Callable

from pdkv.agent.events import (
    DecodeAgentEvent,
    FinishPrefill,
    GrantPages,
    PagesFreed,
    PagesReturned,
    PrefillAgentEvent,
    PrefillWanted,
    StartTransfer,
    TransferArrived,
    TransferEnded,
    TransferFailed,
)
from pdkv.daemons.link import DecodeJob, JobFailed, JobFinished, PrefillJob, ToEngine, ToFront
from pdkv.metric_table import PREFILL_SECONDS, QUEUE_SECONDS
from pdkv.metrics import Meter

_LOG = logging.getLogger("pdkv.engine")


class _Times:
    __slots__ = ("has_pages", "since")

    def __init__(self, since: float) -> None:
        self.since = since
        """When it entered the queue, or got its pages."""
        self.has_pages = False


class TransferJournal:
    """Owned by the engine thread, as is ``meter``."""

    def __init__(self) -> None:
        self.meter = Meter()
        self._jobs: dict[bytes, _Times] = {}

    def front_said(self, message: ToEngine) -> None:
        if isinstance(message, PrefillJob | DecodeJob):
            self._jobs[message.transfer] = _Times(time.monotonic())
            num_tokens = len(message.prompt) if isinstance(message, PrefillJob) else message.num_prompt_tokens
            _log("requested", message.transfer, prompt_tokens=num_tokens)

    def agent_said(self, event: PrefillAgentEvent | DecodeAgentEvent) -> None:
        match event:
            case PrefillWanted(transfer=transfer):
                if (times := self._jobs.get(transfer)) is not None and not times.has_pages:
                    times.since = time.monotonic()
                _log("acquired", transfer)
            case TransferArrived(transfer=transfer, facts=facts):
                _log("arrived", transfer, path=facts.path, bytes=facts.num_bytes, seconds=round(facts.total_s, 4))
            case TransferFailed(transfer=transfer, code=code, message=message):
                _log("failed", transfer, code=code.value, reason=message)
            case TransferEnded(transfer=transfer, code=code, message=message):
                if code is None:
                    _log("released", transfer)
                else:
                    _log("failed", transfer, code=code.value, reason=message)
            case PagesFreed(transfer=transfer) | PagesReturned(transfer=transfer):
                _log("pages free", transfer)

    def posting(self, post: Callable[[object], None]) -> Callable[[object], None]:
        """``post`` to the agent, followed; what is said goes out before it is logged, and is timed as of then: what
        the other threads do with it meanwhile is theirs."""

        def followed(command: object) -> None:
            at = time.monotonic()
            post(command)
            match command:
                case GrantPages(transfer=transfer, pages=pages, cached_tokens=cached):
                    self._got_pages(transfer, at)
                    _log("pages reserved", transfer, pages=len(pages), cached_tokens=cached)
                case StartTransfer(transfer=transfer, pages=pages, resident_blocks=resident):
                    self._got_pages(transfer, at)
                    _log("pages reserved", transfer, pages=len(pages), resident_pages=resident)
                case FinishPrefill(transfer=transfer):
                    if (times := self._jobs.get(transfer)) is not None:
                        self.meter.observe(PREFILL_SECONDS, value=at - times.since)

        return followed

    def sending(self, send: Callable[[ToFront], None]) -> Callable[[ToFront], None]:
        """``send`` to the front, followed. Every job ends with one of the two messages here."""

        def followed(message: ToFront) -> None:
            match message:
                case JobFinished(transfer=transfer, reason=reason):
                    self._jobs.pop(transfer, None)
                    _log("finished", transfer, reason=reason)
                case JobFailed(transfer=transfer, code=code, message=text):
                    self._jobs.pop(transfer, None)
                    _log("job failed", transfer, code=code, reason=text)
            send(message)

        return followed

    def _got_pages(self, transfer: bytes, at: float) -> None:
        times = self._jobs.get(transfer)
        if times is not None and not times.has_pages:
            self.meter.observe(QUEUE_SECONDS, value=at - times.since)
            times.since, times.has_pages = at, True


def _log(state: str, transfer: bytes, **more: object) -> None:
    _LOG.info("transfer %s", state, extra={"transfer": transfer.hex(), **more})
