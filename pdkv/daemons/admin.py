"""The admin port of every daemon: probes, /metrics, /version and POST /drain, apart from where requests come in."""

import importlib.metadata
import platform
from collections.abc import Awaitable, Callable, Iterable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import pdkv
from pdkv.daemons import http_server, version
from pdkv.daemons.exposition import CONTENT_TYPE, exposition
from pdkv.daemons.health import Condition, Health, holds
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.traffic import Traffic
from pdkv.metric_table import BUILD_INFO, DRAINING, LIVE, READY
from pdkv.metrics import Meter, Series

LIVE_PATH, READY_PATH, START_PATH, METRICS_PATH, DRAIN_PATH = "/livez", "/readyz", "/startupz", "/metrics", "/drain"

Collect = Callable[[], Awaitable[Iterable[Series]]]


class Verdict(msgspec.Struct, frozen=True):
    """Body of ``/livez``, ``/readyz`` and ``/startupz``; the status is 200 when every condition holds, else 503."""

    role: str
    ok: bool
    conditions: list[Condition]


class DrainState(msgspec.Struct, frozen=True):
    """Answer of ``POST /drain``; ask again to see what is left."""

    draining: bool
    in_flight: int


class AdminDesk(msgspec.Struct, frozen=True):
    """What the admin port shows and acts on."""

    role: str
    health: Health
    lifecycle: Lifecycle
    traffic: Traffic
    collect: Collect
    """All that the daemon's processes have counted."""
    posts_from_here: bool = False
    """Only callers on this machine may drain the daemon, or end leases."""


def create_admin_app(desk: AdminDesk) -> http_server.App:
    """The HTTP surface for probes, scrapes and operators."""
    routes = _Routes(desk)
    app = http_server.App(posts_from_here=desk.posts_from_here)
    app.add_route(LIVE_PATH, routes.live)
    app.add_route(READY_PATH, routes.ready)
    app.add_route(START_PATH, routes.started)
    app.add_route(version.PATH, version.show)
    app.add_route(METRICS_PATH, routes.metrics)
    app.add_route(DRAIN_PATH, routes.drain, "POST")
    return app


class _Routes:
    def __init__(self, desk: AdminDesk) -> None:
        self._desk = desk

    async def live(self, _request: Request) -> Response:
        return self._judge(self._desk.health.live())

    async def ready(self, _request: Request) -> Response:
        return self._judge(self._desk.health.ready())

    async def started(self, _request: Request) -> Response:
        return self._judge(self._desk.health.started())

    async def metrics(self, _request: Request) -> Response:
        counted = [*await self._desk.collect(), *self._own().series()]
        return Response(exposition(self._desk.role, counted), media_type=CONTENT_TYPE)

    async def drain(self, _request: Request) -> Response:
        """What SIGTERM does, except ending."""
        self._desk.lifecycle.drain()
        state = DrainState(self._desk.lifecycle.draining, self._desk.traffic.in_flight)
        return http_server.json_response(msgspec.json.encode(state))

    def _judge(self, conditions: list[Condition]) -> Response:
        verdict = Verdict(self._desk.role, holds(conditions), conditions)
        return http_server.json_response(msgspec.json.encode(verdict), 200 if verdict.ok else 503)

    def _own(self) -> Meter:
        meter, health = Meter(), self._desk.health
        meter.set(READY, to=holds(health.ready()))
        meter.set(LIVE, to=holds(health.live()))
        meter.set(DRAINING, to=self._desk.lifecycle.draining)
        meter.set(BUILD_INFO, pdkv.__version__, platform.python_version(), _version("torch"), to=1)
        return meter


def _version(package: str) -> str:
    """Of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
