"""Measures jobs as the front sees them: tokens in, tokens out, and the time between them."""

import time

from pdkv.daemons.link import DecodeJob, JobFailed, JobFinished, PrefillJob, TokensOut
from pdkv.metric_table import GENERATION_TOKENS, INTER_TOKEN, PROMPT_TOKENS, TIME_TO_FIRST_TOKEN
from pdkv.metrics import Meter


class _Times:
    __slots__ = ("began", "last_token_at")

    def __init__(self, began: float) -> None:
        self.began = began
        self.last_token_at: float | None = None


class JobMeter:
    """Belongs to the event loop's thread, as its meter does."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._jobs: dict[bytes, _Times] = {}

    def opened(self, job: PrefillJob | DecodeJob) -> None:
        self._jobs[job.transfer] = _Times(time.monotonic())
        num_tokens = len(job.prompt) if isinstance(job, PrefillJob) else job.num_prompt_tokens
        self._meter.count(PROMPT_TOKENS, by=num_tokens)

    def heard(self, message: TokensOut | JobFinished | JobFailed) -> None:
        """A message of the engine process, at the moment in which it came."""
        times = self._jobs.get(message.transfer)
        if times is None or not isinstance(message, TokensOut) or not message.tokens:
            return
        now = time.monotonic()
        self._meter.count(GENERATION_TOKENS, by=len(message.tokens))
        if times.last_token_at is None:
            self._meter.observe(TIME_TO_FIRST_TOKEN, value=now - times.began)
        else:
            each_s = (now - times.last_token_at) / len(message.tokens)
            self._meter.observe(INTER_TOKEN, value=each_s, times=len(message.tokens))
        times.last_token_at = now

    def closed(self, transfer: bytes) -> None:
        self._jobs.pop(transfer, None)
