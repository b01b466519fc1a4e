"""What ``pdkv top`` asks of a router and of each worker's admin port, look after look, and what a row of it says."""

import asyncio
import time
from collections.abc import Sequence
from typing import NamedTuple, TypeVar
from urllib.parse import urlsplit

import msgspec

from pdkv.daemons.admin import METRICS_PATH, READY_PATH, Verdict
from pdkv.daemons.config import Address
from pdkv.daemons.metric_rates import Interval, Scrape, parse
from pdkv.daemons.router import Health
from pdkv.daemons.worker_api import INFO_PATH, WorkerInfo
from pdkv.daemons.worker_client import WholeAnswer, WorkerClient, WorkerLostError
from pdkv.daemons.worker_pool import WorkerView
from pdkv.errors import PdkvError
from pdkv.metric_table import (
    BLOCKS_STRANDED,
    BLOCKS_TOTAL,
    BLOCKS_USED,
    DRAINING,
    GENERATION_TOKENS,
    IN_FLIGHT,
    LEASES_ACTIVE,
    OLDEST_LEASE,
    PEER_SILENCE,
    PEERS,
    PREFILL,
    PROMPT_TOKENS,
    TIME_TO_FIRST_TOKEN,
    TRANSFER_BYTES,
    TRANSFER_FAILURES,
    WAITING,
)

SCHEMA = "pdkv.top/v1"
CONNECT_TIMEOUT_S = 2.0
_HEALTH_PATH = "/health"
_ASKED: dict[type, str] = {Health: "router", WorkerInfo: "pdkv worker", Verdict: "admin port of a pdkv daemon"}
_WILDCARDS = ("0.0.0.0", "::")
Answer = TypeVar("Answer")


class RouterRow(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    answers: bool
    ready: bool = False
    problem: str = ""
    """Why it does not answer, or is not ready."""


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's numbers. None: its role does not count that, or, of rates and percentiles, there was no look before,
    or nothing to take a percentile of."""

    requests_in_flight: int | None = None
    requests_queued: int | None = None
    """Of these: wait for pages."""
    tokens_per_s: float | None = None
    """Prompt tokens that prefill accepted, tokens that decode generated."""
    first_token_p50_s: float | None = None
    first_token_p99_s: float | None = None
    pages_used: int | None = None
    pages_total: int | None = None
    leases: int | None = None
    oldest_lease_s: float | None = None
    pages_stranded: int | None = None
    bytes_per_s: float | None = None
    """Read from prefill workers."""
    transfer_failures: int | None = None
    """Since it was started."""
    new_transfer_failures: int | None = None
    """Since the look before."""
    peers: int | None = None
    longest_silence_s: float | None = None
    """Of a peer."""


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    url: str
    admin_url: str = ""
    """Empty where it is not known."""
    role: str = ""
    """Empty where nobody says."""
    state: str
    """``ready``, ``draining``, ``not ready`` or ``unreachable``."""
    circuit: str = ""
    """What the router makes of it: ``closed`` (in use), ``slow`` or ``open`` (not used); empty where none says."""
    problem: str = ""
    restarted: bool = False
    """It began anew since the look before."""
    figures: Figures = Figures()


class Overview(msgspec.Struct, frozen=True, kw_only=True):
    """One look at a deployment."""

    schema: str = SCHEMA
    seconds: float | None = None
    """Since the look before; None at the first."""
    router: RouterRow | None
    """None where none was asked."""
    workers: list[WorkerRow]

    @property
    def answered(self) -> bool:
        return bool(self.router and self.router.answers) or any(row.state != "unreachable" for row in self.workers)

    def silence(self) -> str:
        """Why nothing answers, for people."""
        tried = [(row.url, row.problem) for row in ([self.router] if self.router else []) + self.workers]
        return "; ".join(f"{url}: {problem}" for url, problem in tried)


class _Looked(NamedTuple):
    row: WorkerRow
    scrape: Scrape | None


class Observer:
    """Looks at a deployment again and again. Owns what the look before saw; belongs to one event loop."""

    def __init__(
        self, client: WorkerClient, router_url: str, worker_urls: Sequence[str], patience_s: float = 5.0
    ) -> None:
        """``router_url`` is empty where none is to be asked; ``worker_urls`` are workers' or their admin ports'.
        ``patience_s``: how long an answer may take."""
        self._client = client
        self._patience_s = patience_s
        self._router_url = router_url.rstrip("/")
        self._worker_urls = tuple(url.rstrip("/") for url in worker_urls)
        self._before: dict[str, Scrape] = {}
        self._looked_at: float | None = None

    async def look(self) -> Overview:
        """Ask all of them at once. What does not answer is a row that says so."""
        at = time.monotonic()
        router, views = await self._ask_router() if self._router_url else (None, {})
        urls = list(dict.fromkeys((*views, *self._worker_urls)))
        looked = await asyncio.gather(*(self._look_at(url, views.get(url)) for url in urls))
        once = {each.row.admin_url or each.row.url: each for each in reversed(looked)}  # one may have been named twice
        kept = [each for each in looked if once[each.row.admin_url or each.row.url] is each]
        self._before = {each.row.url: each.scrape for each in kept if each.scrape}
        seconds, self._looked_at = None if self._looked_at is None else at - self._looked_at, at
        return Overview(seconds=seconds, router=router, workers=[each.row for each in kept])

    async def _ask_router(self) -> tuple[RouterRow, dict[str, WorkerView]]:
        try:
            health = await self._get(self._router_url, _HEALTH_PATH, Health)
        except PdkvError as exc:
            return RouterRow(url=self._router_url, answers=False, problem=str(exc)), {}
        missing = health.missing
        row = RouterRow(url=self._router_url, answers=True, ready=not missing, problem="; ".join(missing))
        return row, {view.url: view for view in health.workers}

    async def _look_at(self, url: str, view: WorkerView | None) -> _Looked:
        role, circuit = (view.role, _circuit(view)) if view else ("", "")
        admin_url = ""
        try:
            admin_url = await self._admin_url(url)
            verdict = await self._get(admin_url, READY_PATH, Verdict)
            scrape = await self._scrape(admin_url)
        except PdkvError as exc:
            row = WorkerRow(
                url=url, admin_url=admin_url, role=role, state="unreachable", circuit=circuit, problem=str(exc)
            )
            return _Looked(row, None)
        interval = Interval(self._before.get(url), scrape)
        problems = [condition.message or condition.name for condition in verdict.conditions if not condition.ok]
        if view and view.problem and not problems:
            problems = [f"the router says: {view.problem}"]
        row = WorkerRow(
            url=url,
            admin_url=admin_url,
            role=verdict.role,
            state=_state(verdict, scrape),
            circuit=circuit,
            problem="; ".join(problems),
            restarted=interval.restarted,
            figures=figures(scrape, interval),
        )
        return _Looked(row, scrape)

    async def _admin_url(self, url: str) -> str:
        """Of the worker at ``url``, which tells it; what has no such path is taken for an admin port itself."""
        answer = await self._ask(url + INFO_PATH)
        if answer.status == 404:
            return url
        admin = _decoded(answer.body, url + INFO_PATH, WorkerInfo).admin
        if not admin:
            raise PdkvError("it does not tell its admin port; name that by --worker")
        return reachable(Address(admin), url)

    async def _scrape(self, url: str) -> Scrape:
        answer = await self._ask(url + METRICS_PATH)
        scrape = parse(answer.body.decode(errors="replace"), time.monotonic())
        if answer.status != 200 or not scrape.role():
            raise PdkvError(f"{url + METRICS_PATH} answers {answer.status}, and not as an admin port does")
        return scrape

    async def _get(self, url: str, path: str, kind: type[Answer]) -> Answer:
        """Whatever the status: that of a daemon that is not ready is 503."""
        answer = await self._ask(url + path)
        return _decoded(answer.body, url + path, kind)

    async def _ask(self, url: str) -> WholeAnswer:
        try:
            return await self._client.ask("GET", url, self._patience_s)
        except WorkerLostError as exc:
            late = isinstance(exc.__cause__, TimeoutError)
            raise PdkvError(f"does not answer within {self._patience_s:g} s" if late else str(exc)) from exc


def figures(now: Scrape, interval: Interval) -> Figures:
    """A worker's numbers. ``interval``: since the look before."""
    tokens = PROMPT_TOKENS if now.role() == PREFILL else GENERATION_TOKENS
    return Figures(
        requests_in_flight=_whole(now.total(IN_FLIGHT)),
        requests_queued=_whole(now.total(WAITING, stage="queued")),
        tokens_per_s=interval.rate(tokens),
        first_token_p50_s=interval.quantile(TIME_TO_FIRST_TOKEN, 0.5),
        first_token_p99_s=interval.quantile(TIME_TO_FIRST_TOKEN, 0.99),
        pages_used=_whole(now.total(BLOCKS_USED)),
        pages_total=_whole(now.total(BLOCKS_TOTAL)),
        leases=_whole(now.total(LEASES_ACTIVE)),
        oldest_lease_s=now.total(OLDEST_LEASE),
        pages_stranded=_whole(now.total(BLOCKS_STRANDED)),
        bytes_per_s=interval.rate(TRANSFER_BYTES),
        transfer_failures=_whole(now.total(TRANSFER_FAILURES)),
        new_transfer_failures=_whole(interval.increase(TRANSFER_FAILURES)),
        peers=_whole(now.total(PEERS)),
        longest_silence_s=now.total(PEER_SILENCE),
    )


def reachable(admin: Address, url: str) -> str:
    """URL of the admin port ``admin`` of a worker that answers at ``url``. Raises ``PdkvError`` for one that listens on
    loopback of another machine."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    asked = Address(f"{host}:1")
    if admin.host in _WILDCARDS:
        return f"http://{Address(f'{host}:{admin.port}')}"
    if admin.is_loopback and not asked.is_loopback:
        raise PdkvError(f"its admin port listens on {admin}, for its own machine only; see --admin-listen")
    return f"http://{admin}"


def _state(verdict: Verdict, scrape: Scrape) -> str:
    if scrape.total(DRAINING):
        return "draining"
    return "ready" if verdict.ok else "not ready"


def _circuit(view: WorkerView) -> str:
    """As the router counts them (``pdkv_router_circuits``): one that is ready and has a problem is slow."""
    if not view.ready:
        return "open"
    return "slow" if view.problem else "closed"


def _decoded(body: bytes, asked: str, kind: type[Answer]) -> Answer:
    try:
        return msgspec.json.decode(body, type=kind)
    except msgspec.MsgspecError as exc:
        raise PdkvError(f"what answers at {asked} is no {_ASKED[kind]}") from exc


def _whole(value: float | None) -> int | None:
    return None if value is None else round(value)
