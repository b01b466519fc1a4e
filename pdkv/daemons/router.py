"""The router: takes clients' requests, gives each to a prefill and a decode worker at once, passes the answer on.

It never looks into a body: workers validate, and it tells a stream by the answer's content type.
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdkv.daemons import http_server, openai_api, version, worker_api
from pdkv.daemons.admin import AdminDesk, create_admin_app
from pdkv.daemons.api_keys import ApiKeys
from pdkv.daemons.attempt import Asked, AttemptFailedError, Upstream, attempt
from pdkv.daemons.config import Address, RouterConfig
from pdkv.daemons.lifecycle import Lifecycle, background
from pdkv.daemons.openai_api import ApiError, ErrorBody
from pdkv.daemons.router_health import RouterHealth
from pdkv.daemons.router_metrics import RouterMetrics
from pdkv.daemons.text_proxy import TextProxy
from pdkv.daemons.tls import Certificate
from pdkv.daemons.tracing import tracing
from pdkv.daemons.traffic import Traffic, note_failure
from pdkv.daemons.worker_client import WorkerClient, WorkerLostError
from pdkv.daemons.worker_pool import WorkerPool, WorkerView
from pdkv.errors import FailureCode
from pdkv.metric_table import ROUTER
from pdkv.metrics import Meter

_CONNECT_TIMEOUT_S = 5.0
_log = structlog.get_logger(__name__)


class Health(msgspec.Struct, frozen=True):
    """Body of ``GET /health``: 200 when ``missing`` is empty, else 503."""

    status: str
    missing: list[str]
    workers: list[WorkerView]


async def run_router(config: RouterConfig) -> int:
    """Serve until a signal; returns the exit code."""
    life = Lifecycle()
    meter = Meter()
    keys = ApiKeys(config.api_keys) if config.api_keys is not None else None
    certificate = Certificate(config.tls_cert, config.tls_key) if config.tls_cert and config.tls_key else None
    with (
        http_server.listen(Address(config.listen), reuse_port=config.reuse_port) as sock,
        http_server.listen(Address(config.admin_listen), reuse_port=config.reuse_port) as admin_sock,
        life.on_signals(),
        tracing(ROUTER) as spans,
    ):
        async with WorkerClient(_CONNECT_TIMEOUT_S, http_server.CLIENT_KEEP_ALIVE_S) as client:
            pool = WorkerPool(client, config.prefill_urls, config.decode_urls, config.poll_interval)
            metrics = RouterMetrics(pool, meter, certificate)
            texts = TextProxy(client, pool)
            router = Router(client, pool, metrics, config.request_timeout, config.retries)
            traffic = Traffic(ROUTER, life, meter, spans)
            health = RouterHealth(pool, life)

            async def is_idle() -> bool:
                return traffic.in_flight == 0

            async with (
                pool.polling(),
                http_server.serving(
                    create_admin_app(AdminDesk(ROUTER, health, life, traffic, metrics.collect)), admin_sock
                ),
                background(life.stop_when_drained(is_idle, config.drain_timeout)),
            ):
                url, admin = http_server.bound_address(sock), http_server.bound_address(admin_sock)
                _log.info("listening", url=f"{'https' if certificate else 'http'}://{url}", admin=admin)
                app = create_app(router, texts, health, traffic, keys)
                tls = certificate.context if certificate else None
                await http_server.serve(app, sock, life, router.cancel_all, tls)
    return life.exit_code


def create_app(
    router: "Router", texts: TextProxy, health: RouterHealth, traffic: Traffic, keys: ApiKeys | None
) -> http_server.App:
    """The HTTP surface for clients; with ``keys``, all but probes asks for one."""

    async def show_health(_request: Request) -> Response:
        missing = [condition.message for condition in health.ready() if not condition.ok]
        body = Health("not ready" if missing else "ready", missing, router.workers())
        return http_server.json_response(msgspec.json.encode(body), 503 if missing else 200)

    app = http_server.App(traffic, keys=keys)
    app.add_route("/health", show_health, needs_key=False)
    app.add_route(version.PATH, version.show, needs_key=False)
    app.add_route("/v1/models", router.models)
    for path in worker_api.PREFILL_PATHS:
        app.add_route(path, router.generate, "POST")
    for path, method in worker_api.TEXT_PATHS.items():
        app.add_route(path, texts.pass_on, method)
    return app


class Router:
    """Routes requests over a pool. Belongs to the event loop's thread."""

    def __init__(
        self,
        client: WorkerClient,
        pool: WorkerPool,
        metrics: RouterMetrics,
        request_timeout_s: float,
        retries: int,
    ) -> None:
        self._metrics = metrics
        self._client = client
        self._pool = pool
        self._request_timeout_s = request_timeout_s
        self._retries = retries
        self._waits: set[asyncio.Timeout] = set()
        self._stopping = False

    def cancel_all(self) -> None:
        """End every running request: each is told that the router is going."""
        self._stopping = True
        now = asyncio.get_running_loop().time()
        for wait in self._waits:
            wait.reschedule(now)

    def workers(self) -> list[WorkerView]:
        return self._pool.view()

    async def models(self, _request: Request) -> Response:
        models = self._pool.models()
        if not models:
            raise self._not_ready()
        return http_server.json_response(openai_api.encode_models(models))

    async def generate(self, request: Request) -> Response:
        """A completion or a chat completion."""
        deadline = asyncio.get_running_loop().time() + self._request_timeout_s
        body = await http_server.read_body(request)
        headers = {
            **http_server.trace_headers(request),
            worker_api.REQUEST_ID: http_server.request_id(request),
            worker_api.ASKED_AT: f"{time.time():.6f}",
        }
        if worker_api.DEBUG in request.headers:
            headers[worker_api.DEBUG] = request.headers[worker_api.DEBUG]
        async with http_server.unless_gone(request):
            answer = await self._route(Asked(request.scope["path"], body, headers), deadline)
        return _Passed(self._pass_on(answer, deadline), answer) if isinstance(answer, Upstream) else answer

    async def _route(self, asked: Asked, deadline: float) -> "Upstream | Response":
        """An open stream, or a whole answer. Raises ApiError when no try leads to one."""
        failed: AttemptFailedError | None = None
        try:
            async with self._until(deadline):
                for num_tries in range(self._retries + 1):
                    pair = self._pool.next_pair()
                    if pair is None:
                        self._metrics.rejected()
                        break
                    self._metrics.chosen(num_tries)
                    try:
                        seconds_left = deadline - asyncio.get_running_loop().time()
                        upstream = await attempt(self._client, self._metrics, pair, asked, seconds_left)
                        return upstream if upstream.is_stream else await self._whole(upstream)
                    except AttemptFailedError as exc:
                        failed = exc
                    _log.warning("try failed", prefill=pair.prefill.url, decode=pair.decode.url, error=str(failed))
                    await self._pool.doubt(pair.prefill, pair.decode, reason=f"failed a request: {failed}")
        except TimeoutError:
            raise self._too_late() from failed
        raise failed.error if failed else self._not_ready()

    async def _whole(self, upstream: Upstream) -> Response:
        try:
            body = await upstream.read()
        finally:
            await upstream.close()
        retry_after = upstream.decode.header("retry-after")
        headers = {"Retry-After": retry_after} if retry_after else None
        return http_server.json_response(body, upstream.decode.status, headers)

    async def _pass_on(self, upstream: Upstream, deadline: float) -> AsyncGenerator[bytes, None]:
        """D's events as they come, whole events only; one that ends too soon ends in an error event of ours."""
        partial = b""
        last = b""
        error: ErrorBody | None = None
        try:
            while True:
                async with self._until(deadline):
                    chunk = await upstream.decode.piece()
                if not chunk:
                    break
                events, end, partial = (partial + chunk).rpartition(b"\n\n")
                if end:
                    last = events.rpartition(b"\n\n")[2]
                    yield events + end
            if last.startswith(b'data: {"error"'):
                note_failure("upstream")
            elif last == openai_api.END_OF_STREAM.strip():
                upstream.complete()
            else:
                error = _broken("it ended without [DONE]")
        except WorkerLostError as exc:
            error = _broken(str(exc))
        except TimeoutError:
            error = self._too_late().body
        if error is not None:
            note_failure(error.code)
            _log.warning("stream broken", error=error.message)
            yield openai_api.encode_event(error)

    @contextlib.asynccontextmanager
    async def _until(self, deadline: float) -> AsyncIterator[None]:
        async with asyncio.timeout_at(0.0 if self._stopping else deadline) as wait:
            self._waits.add(wait)
            try:
                yield
            finally:
                self._waits.discard(wait)

    def _too_late(self) -> ApiError:
        if self._stopping:
            return ApiError.of(503, "the router is ending", code=FailureCode.SHUTDOWN.value, retry_after_s=1)
        return ApiError.of(504, f"no answer within {self._request_timeout_s:g} s", code=FailureCode.DEADLINE.value)

    def _not_ready(self) -> ApiError:
        return ApiError.of(
            503, "; ".join(self._pool.missing()) or "no worker is ready", code="not_ready", retry_after_s=1
        )


class _Passed(http_server.EventStream):
    """A stream that is passed on; closes both upstream requests however it ends."""

    def __init__(self, events: AsyncGenerator[bytes, None], upstream: Upstream) -> None:
        super().__init__(events)
        self._upstream = upstream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._upstream.close()


def _broken(how: str) -> ErrorBody:
    return ErrorBody(f"the decode worker's answer broke off ({how})", "server_error", code=FailureCode.PEER_LOST.value)
