"""Many requests at once through a real prefill and decode worker whose pages are few, each compared with its undivided
answer."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from pdkv.daemons.engine_side import EngineSide
from pdkv.daemons.link import (
    AbortJob,
    DecodeJob,
    GroupTokens,
    JobFailed,
    JobFinished,
    PrefillJob,
    Sampling,
    Status,
    StatusQuery,
    StepTokens,
    ToFront,
    TokenReader,
    TokensOut,
    TransferReport,
    WorkerSettings,
)
from pdkv.daemons.rank_threads import thread_ranks
from pdkv.daemons.worker_settings import worker_settings
from pdkv.m3.model import M3Model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestId, TokenGenerated, singly
from pdkv.m3.sampling import SamplingParams
from pdkv.memory.pages import PagePool
from pdkv.transport.inproc import Faults, InprocTransport
from pdkv.verify.undivided import local_worker
from tests.checkpoints import write_random_checkpoint

BLOCK = 128
DEADLINE_S = 600.0
PATIENCE_S = 60.0
"""Without a word about any job: then the test says where they stand, before its time is up."""
NEAR_TIE = 1e-4
"""Below this gap between the two likeliest tokens, another order of sums may choose the other (design.md 8)."""


def write_tiny_checkpoint(directory: Path, seed: int = 3) -> None:
    """Three layers, two of them sparse, two blocks a query."""
    write_random_checkpoint(
        directory,
        seed,
        num_hidden_layers=3,
        layer_types=["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "sparse", "sparse"],
        head_dim=16,
        rotary_dim=8,
        index_head_dim=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        index_n_heads=2,
    )


@dataclass(frozen=True)
class Job:
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    cancel_at: int | None = None
    """Turn of the workers in which the client goes away."""


class Outcome:
    """What the front heard of one job."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.largest_piece = 0
        self.report: TransferReport | None = None
        self.error: JobFailed | None = None
        self.over = False


def make_jobs(rng: random.Random, lengths: Sequence[int], cancelled: float, last_turn: int) -> list[Job]:
    """Prompts of about these lengths in random order, most of which begin as others do, some periodic; ``cancelled``:
    share of those whose client goes away in some turn up to ``last_turn``."""
    shared = [[rng.randrange(3, 320) for _ in range(max(lengths))] for _ in range(3)]
    jobs = []
    for length in lengths:
        kind = rng.random()
        if kind < 0.2:
            period = [rng.randrange(3, 320) for _ in range(rng.randrange(1, 9))]
            prompt = (period * length)[:length]
        else:
            common = rng.randrange(length) if kind < 0.8 else 0
            prompt = rng.choice(shared)[:common] + [rng.randrange(3, 320) for _ in range(length - common)]
        sampling = Sampling() if rng.random() < 0.7 else Sampling(temperature=1.0, seed=rng.randrange(1 << 32))
        cancel_at = rng.randrange(last_turn) if rng.random() < cancelled else None
        jobs.append(Job(tuple(prompt), rng.randrange(1, 25), sampling, cancel_at))
    rng.shuffle(jobs)
    return jobs


class Pair:
    """One P and one D over ``inproc``, driven by the calling thread. Use as a context."""

    def __init__(
        self,
        model_dir: Path,
        pages: tuple[int, int],
        max_model_len: int,
        *,
        tp: tuple[int, int] = (1, 1),
        faults: Faults | None = None,
        **settings: object,
    ) -> None:
        """``pages``: of P's arena and of D's, the probe's two included; ``tp``: ranks of each, threads of this process.
        ``faults``: of D's reads. ``settings``: other fields of both workers."""
        self._heard: list[ToFront] = []
        self._reader = TokenReader()
        self._status: list[Status] = []
        self._round = 0
        self.most_jobs_told = 0
        """Of how many jobs a message told tokens."""
        self._outcomes: list[Outcome] = []
        self.sides = []
        for role, num_pages, tp_size in zip(("prefill", "decode"), pages, tp, strict=True):
            plain = _settings(role, model_dir, num_pages, max_model_len)
            mine = msgspec.structs.replace(plain, tp_size=tp_size, **settings)
            others = thread_ranks(tp_size, InprocTransport)
            self.sides.append(EngineSide(mine, self._heard.append, InprocTransport(faults), others))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None) -> None:
        for side in reversed(self.sides):
            side.close()

    def run(self, jobs: Sequence[Job]) -> list[Outcome]:
        """All jobs at once; returns when each has ended and both workers have let go of everything."""
        prefill, decode = self.sides
        ready = prefill.ready()
        outcomes = self._outcomes = [Outcome() for _ in jobs]
        self._round += 1  # every try has a transfer id of its own
        for number, job in enumerate(jobs):
            transfer = self._transfer(number)
            prefill.hear(PrefillJob(transfer, list(job.prompt), job.sampling, DEADLINE_S))
            message = DecodeJob(
                transfer=transfer,
                prompt=list(job.prompt),
                max_tokens=job.max_tokens,
                sampling=job.sampling,
                ignore_eos=True,
                prefill_control=ready.control,
                prefill_incarnation=ready.incarnation,
                deadline_s=DEADLINE_S,
            )
            decode.hear(message)
        turn, give_up = 0, time.monotonic() + PATIENCE_S
        while not all(outcome.over for outcome in outcomes):
            assert time.monotonic() < give_up, self._where_jobs_stand(outcomes)
            for number, job in enumerate(jobs):
                if job.cancel_at == turn and not outcomes[number].over:
                    prefill.hear(AbortJob(self._transfer(number)))
                    decode.hear(AbortJob(self._transfer(number)))
            if self._turn(outcomes):
                give_up = time.monotonic() + PATIENCE_S
            turn += 1
        while any(status.pages_free != status.pages_usable for status in self.status()):
            assert time.monotonic() < give_up, (
                f"pages leak: {[(s.role, s.pages_free, s.pages_usable) for s in self.status()]}"
            )
        return outcomes

    def _where_jobs_stand(self, outcomes: Sequence[Outcome]) -> str:
        """Of those that have not ended: what each worker's engine and agent make of them."""
        told = [f"{sum(not outcome.over for outcome in outcomes)} jobs have not ended"]
        for status in self.status():
            told.append(f"{status.role}: {msgspec.structs.replace(status, series=[])}")
        for side in self.sides:
            told.append(f"engine: {side._engine.statistics()}")
            for transfer, moved in side._parts.agent._transfers.items():
                if self._is_current(transfer):
                    told.append(f"{transfer.hex()}: {vars(moved.session)}")
        return "\n".join(told)

    def status(self) -> list[Status]:
        """Of P and D, with all series."""
        self._status.clear()
        for side in self.sides:
            side.hear(StatusQuery(0, with_series=True))
        while len(self._status) < 2:
            self._turn(self._outcomes)
        return sorted(self._status, key=lambda status: status.role, reverse=True)

    def counted(self, name: str, label: str) -> float:
        """A counter's value over both workers."""
        series = [series for status in self.status() for series in status.series]
        return sum(one.value for one in series if one.name == name and label in one.labels)

    def pools(self) -> list[PagePool]:
        return [side._parts.pool for side in self.sides]

    def _transfer(self, number: int) -> bytes:
        return self._round.to_bytes(8, "big") + number.to_bytes(8, "big")

    def _turn(self, outcomes: list[Outcome]) -> bool:
        """Whether a worker had something to tell of these."""
        has_heard = False
        for side in self.sides:
            side.turn(0.001)
        while self._heard:
            message = self._heard.pop(0)
            if isinstance(message, StepTokens | GroupTokens):
                told = list(self._reader.each(message))
                self.most_jobs_told = max(self.most_jobs_told, len({one.transfer for one in told}))
                self._heard[:0] = told
            elif isinstance(message, Status):
                self._status.append(message)
            elif isinstance(message, TokensOut | JobFinished | JobFailed) and self._is_current(message.transfer):
                _take(message, outcomes[int.from_bytes(message.transfer[8:], "big")])
                has_heard = True
        return has_heard

    def _is_current(self, transfer: bytes) -> bool:
        """Not of jobs that were over before; what is told of those nobody waits for."""
        return transfer[:8] == self._round.to_bytes(8, "big")


def _take(message: TokensOut | JobFinished | JobFailed, outcome: Outcome) -> None:
    match message:
        case TokensOut(tokens=tokens):
            assert not outcome.over, "tokens after the end"
            outcome.tokens += tokens
            outcome.largest_piece = max(outcome.largest_piece, len(tokens))
        case JobFinished(reason="length", report=report):
            outcome.report = report
            outcome.over = True
        case JobFailed() if not outcome.over:  # the other worker may have told it before
            outcome.error = message
            outcome.over = True


def assert_all_right(
    model: M3Model, jobs: Sequence[Job], outcomes: Sequence[Outcome], may_fail: frozenset[str] = frozenset()
) -> int:
    """Every answer is the undivided one, or its beginning where the client went away. Names the first that is not.

    ``may_fail``: codes with which a job may have failed by itself. Returns how many answers left the undivided one at a
    near tie: at most one in a thousand tokens, or one in all.
    """
    num_near_ties = num_tokens = 0
    for ordinal, (job, outcome) in enumerate(zip(jobs, outcomes, strict=True)):
        if outcome.error is not None:
            is_cancelled = outcome.error.code == "cancelled" and job.cancel_at is not None
            assert is_cancelled or outcome.error.code in may_fail, f"request {ordinal}: {outcome.error}"
        expected = undivided(model, job)
        told = outcome.tokens
        assert outcome.error is not None or len(told) == job.max_tokens
        num_tokens += len(told)
        wrong = next((i for i, token in enumerate(told) if token != expected[i].token), None)
        if wrong is None:
            continue
        best, second = expected[wrong].top.logprobs[:2]
        where = f"request {ordinal} of {len(jobs)} ({len(job.prompt)} tokens) is wrong from token {wrong} on"
        assert job.sampling.temperature == 0 and best - second < NEAR_TIE, f"{where}: {told}"  # noqa: PT018
        num_near_ties += 1
    assert num_near_ties <= max(1, num_tokens // 1000), f"{num_near_ties} near ties in {num_tokens} tokens"
    return num_near_ties


def undivided(model: M3Model, job: Job) -> list[TokenGenerated]:
    """What an engine without cache, proposals or company answers."""
    num_tokens = len(job.prompt) + job.max_tokens
    engine = local_worker(model, -(-num_tokens // BLOCK), EngineSettings(max_model_len=num_tokens)).engine
    request = CompleteRequest(
        id=RequestId(b"alone"),
        prompt=job.prompt,
        max_tokens=job.max_tokens,
        sampling=SamplingParams(job.sampling.temperature, job.sampling.seed),
        ignore_eos=True,
        num_top=2,
    )
    events = engine.submit(request)
    while engine.has_work:
        events += engine.step()
    return [event for event in singly(events) if isinstance(event, TokenGenerated)]


def _settings(role: str, model_dir: Path, num_pages: int, max_model_len: int) -> WorkerSettings:
    plain = worker_settings(role, model_dir, max_model_len, num_pages, 512)
    return msgspec.structs.replace(plain, max_batch=16, num_threads=1, prefix_cache=True)
