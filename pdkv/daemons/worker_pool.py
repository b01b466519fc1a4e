"""Which workers the router may use: finds them, looks at each again and again, and hands out pairs in turn."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import NamedTuple

import msgspec
import structlog

from pdkv.daemons.config import DNS_SCHEME
from pdkv.daemons.discovery import Lookup, Resolve, resolve_by_system
from pdkv.daemons.worker_api import INFO_PATH, WorkerInfo
from pdkv.daemons.worker_client import WorkerClient, WorkerLostError
from pdkv.metric_table import DECODE, PREFILL, WORKERS

_QUICK_S = 0.2
"""Between looks at a worker that is not ready."""
_log = structlog.get_logger(__name__)


class Patience(NamedTuple):
    """How long a worker may take to answer a look: on a machine whose cores all compute, seconds, and it is well."""

    slow_s: float = 2.0
    """Longer, and others come first. After a request that failed: longer, and it is not used."""
    lost_s: float = 10.0
    """Longer, and it is not used until it answers again."""


class Worker:
    """One worker as the router last saw it; belongs to the pool."""

    def __init__(self, url: str, role: str) -> None:
        self.url = url
        self.role = role
        self.info: WorkerInfo | None = None
        """None while it cannot be used; ``problem`` then says why."""
        self.problem = "not asked yet"
        self.is_slow = False
        """It is long in answering, and ``problem`` says so; it is used where no other is at hand."""
        self.num_doubts = 0
        self.last_incarnation = ""
        self.kick = asyncio.Event()


class Pair(NamedTuple):
    """A prefill and a decode worker that fit together, and what was known of P when it was chosen."""

    prefill: Worker
    decode: Worker
    prefill_control: str
    prefill_incarnation: str

    @property
    def num_slow(self) -> int:
        return self.prefill.is_slow + self.decode.is_slow


class WorkerView(msgspec.Struct, frozen=True):
    """One worker, for ``GET /health``."""

    url: str
    role: str
    ready: bool
    problem: str
    """Why it is not ready; or, of one that is, why others come first."""
    incarnation: str
    manifest_digest: str


class Roster:
    """The workers of one role: those that were named, and those behind names that are looked up."""

    def __init__(self, role: str, targets: Sequence[str], resolve: Resolve) -> None:
        self.role = role
        self.lookups = [Lookup(target, resolve) for target in targets if target.startswith(DNS_SCHEME)]
        self._named = [target for target in targets if not target.startswith(DNS_SCHEME)]
        self.workers: list[Worker] = []
        self.renew()

    def renew(self) -> tuple[list[Worker], list[Worker]]:
        """Follow the lookups; returns the workers that are new and those that are gone."""
        found = (url for lookup in self.lookups for url in lookup.urls)
        known = {worker.url: worker for worker in self.workers}
        self.workers = [known.get(url) or Worker(url, self.role) for url in dict.fromkeys((*self._named, *found))]
        new = [worker for worker in self.workers if worker.url not in known]
        return new, [worker for worker in known.values() if worker not in self.workers]

    def ready(self) -> list[Worker]:
        """Each life once, also when it has several addresses."""
        first: dict[str, Worker] = {}
        for worker in sorted(self.workers, key=lambda worker: worker.is_slow):
            if worker.info:
                first.setdefault(worker.info.incarnation, worker)
        return list(first.values())

    def problems(self) -> str:
        """Why none of them can be used."""
        told = [f"{lookup.target}: {lookup.problem}" for lookup in self.lookups if lookup.problem]
        return "; ".join(told + [f"{worker.url}: {worker.problem}" for worker in self.workers])


class WorkerPool:
    """All workers of a router. Belongs to the event loop's thread. Targets: URLs, or ``dns://HOST:PORT``."""

    def __init__(
        self,
        client: WorkerClient,
        prefill: Sequence[str],
        decode: Sequence[str],
        poll_interval_s: float,
        resolve: Resolve = resolve_by_system,
        patience: Patience = Patience(),  # noqa: B008 - of numbers, and frozen
    ) -> None:
        self._client = client
        self._patience = patience
        self._poll_interval_s = poll_interval_s
        self._rosters = {PREFILL: Roster(PREFILL, prefill, resolve), DECODE: Roster(DECODE, decode, resolve)}
        self._watches: dict[Worker, asyncio.Task[None]] = {}
        self._turn = 0
        self.num_taken_out = dict.fromkeys(WORKERS, 0)
        """By role: how often a worker that was in use no longer was."""
        self.num_restarts = dict.fromkeys(WORKERS, 0)
        """By role: how often a worker came again with another incarnation."""

    @contextlib.asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Keep looking for workers, and at all of them, while the block runs."""
        async with asyncio.TaskGroup() as group:
            for worker in self.workers():
                self._watches[worker] = group.create_task(self._watch(worker))
            follows = [
                group.create_task(self._follow(roster, lookup, group))
                for roster in self._rosters.values()
                for lookup in roster.lookups
            ]
            try:
                yield
            finally:
                for task in (*follows, *self._watches.values()):
                    task.cancel()
                self._watches.clear()

    def workers(self) -> Iterator[Worker]:
        """Prefill workers first."""
        for role in WORKERS:
            yield from self._rosters[role].workers

    def view(self) -> list[WorkerView]:
        return [
            WorkerView(
                url=worker.url,
                role=worker.role,
                ready=worker.info is not None,
                problem=worker.problem,
                incarnation=worker.info.incarnation if worker.info else "",
                manifest_digest=worker.info.manifest_digest if worker.info else "",
            )
            for worker in self.workers()
        ]

    def pairs(self) -> list[Pair]:
        """All ready pairs that fit, diagonals first, so that neighbours share no worker where they can."""
        prefills, decodes = self._rosters[PREFILL].ready(), self._rosters[DECODE].ready()
        wrap = max(len(prefills), len(decodes))
        found = [
            ((d - p) % wrap, p, Pair(prefill, decode, prefill.info.control, prefill.info.incarnation))
            for p, prefill in enumerate(prefills)
            for d, decode in enumerate(decodes)
            if prefill.info and decode.info and prefill.info.fits(decode.info)
        ]
        return [pair for _, _, pair in sorted(found, key=lambda entry: entry[:2])]

    def next_pair(self) -> Pair | None:
        """The pair whose turn it is, of those with the fewest slow workers; None when there is none."""
        pairs = self.pairs()
        if not pairs:
            return None
        least = min(pair.num_slow for pair in pairs)
        pairs = [pair for pair in pairs if pair.num_slow == least]
        self._turn += 1
        return pairs[(self._turn - 1) % len(pairs)]

    def missing(self) -> list[str]:
        """What keeps every pair from being ready; empty when one is."""
        if self.pairs():
            return []
        missing = [
            f"no {role} worker is ready ({roster.problems()})"
            for role, roster in self._rosters.items()
            if not roster.ready()
        ]
        return missing or [
            f"no prefill and decode worker have the same manifest and the same tokenizer ({self._digests()})"
        ]

    def models(self) -> dict[str, int]:
        """The models that can be asked for, with the longest context that both of a pair allow."""
        lengths: dict[str, int] = {}
        for pair in self.pairs():
            assert pair.prefill.info, "pairs() gives ready workers"
            assert pair.decode.info, "pairs() gives ready workers"
            longest = min(pair.prefill.info.max_model_len, pair.decode.info.max_model_len)
            lengths[pair.decode.info.model] = max(longest, lengths.get(pair.decode.info.model, 0))
        return lengths

    async def doubt(self, *workers: Worker, reason: str) -> None:
        """Do not use these workers until they have answered again; asks them now, and returns when that is known."""
        for worker in workers:
            worker.num_doubts += 1
            self._note(worker, None, reason)
            worker.kick.set()
        await asyncio.gather(*(self._poll(worker, self._patience.slow_s) for worker in workers))

    async def _follow(self, roster: Roster, lookup: Lookup, group: asyncio.TaskGroup) -> None:
        while True:
            if await lookup.look():
                new, gone = roster.renew()
                for worker in new:
                    _log.info("worker found", url=worker.url, worker=worker.role, target=lookup.target)
                    self._watches[worker] = group.create_task(self._watch(worker))
                for worker in gone:
                    _log.info("worker gone", url=worker.url, worker=worker.role, target=lookup.target)
                    self._watches.pop(worker).cancel()
            await asyncio.sleep(self._poll_interval_s)

    async def _watch(self, worker: Worker) -> None:
        while True:
            await self._poll(worker, self._patience.lost_s)
            worker.kick.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._poll_interval_s if worker.info else _QUICK_S):
                    await worker.kick.wait()

    async def _poll(self, worker: Worker, limit_s: float) -> None:
        num_doubts = worker.num_doubts
        loop = asyncio.get_running_loop()
        silence = loop.call_later(self._patience.slow_s, self._note_silence, worker, num_doubts)
        try:
            info, problem = await self._ask(worker, limit_s)
        finally:
            silence.cancel()
        if num_doubts != worker.num_doubts:
            return  # the question was put before the doubt arose
        before = worker.info
        if worker.is_slow:
            _log.info("worker answers again", url=worker.url, worker=worker.role, problem=problem)
        worker.is_slow = False
        self._note(worker, info, problem)
        if (before and before.incarnation) != (info and info.incarnation):
            log = _log.info if info else _log.warning
            log("worker ready" if info else "worker not ready", url=worker.url, worker=worker.role, problem=problem)

    def _note(self, worker: Worker, info: WorkerInfo | None, problem: str) -> None:
        """What is known of a worker from now on; counted where that is a change."""
        if worker.info and not info:
            self.num_taken_out[worker.role] += 1
        if info:
            self.num_restarts[worker.role] += worker.last_incarnation not in ("", info.incarnation)
            worker.last_incarnation = info.incarnation
        worker.info, worker.problem = info, problem

    def _note_silence(self, worker: Worker, num_doubts: int) -> None:
        if worker.info and num_doubts == worker.num_doubts:
            worker.is_slow = True
            worker.problem = f"slow: has not answered for {self._patience.slow_s:g} s"
            _log.warning("worker slow", url=worker.url, worker=worker.role, problem=worker.problem)

    async def _ask(self, worker: Worker, limit_s: float) -> tuple[WorkerInfo | None, str]:
        try:
            answer = await self._client.ask("GET", worker.url + INFO_PATH, limit_s)
            info = msgspec.json.decode(answer.body, type=WorkerInfo)
        except WorkerLostError as exc:
            return None, str(exc)
        except msgspec.MsgspecError:
            return None, "answers, but is no pdkv worker"
        if info.role != worker.role:
            return None, f"is a {info.role} worker, but the router was told that it is a {worker.role} worker"
        return (info, "") if info.ready else (None, info.problem or "not ready")

    def _digests(self) -> str:
        return "; ".join(
            f"{worker.url}: {worker.role} {worker.info.manifest_digest[:16]} {worker.info.prompt_digest}"
            for worker in self.workers()
            if worker.info
        )
