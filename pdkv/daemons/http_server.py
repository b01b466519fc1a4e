"""The HTTP ground that worker fronts and router stand on: error form, body limit, disconnects, shutdown."""

import asyncio
import contextlib
import secrets
import socket
import ssl
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator

import structlog
import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdkv.daemons.api_keys import ApiKeys
from pdkv.daemons.config import Address, is_loopback
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.openai_api import MAX_BODY_BYTES, ApiError
from pdkv.daemons.trace_context import Trace, trace_of
from pdkv.daemons.traffic import Gate, Traffic, note_failure
from pdkv.daemons.worker_api import REQUEST_ID
from pdkv.errors import ConfigError, RequestError

_GRACE_S = 3
"""After the end: seconds in which running requests may say that they were cancelled."""
_SIDE_GRACE_S = 1
_KEEP_ALIVE_S = 75
"""Longer than any client of ours keeps an idle connection, so that no request meets a closing one."""
CLIENT_KEEP_ALIVE_S = 30

_REQUEST_ID = REQUEST_ID.encode()
_CLIENT = "pdkv.client"
"""Key of a request's ``Client`` in its scope."""
_log = structlog.get_logger(__name__)


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


class App:
    """An ASGI app of fixed paths. Answers every error, unknown routes included, as ``{"error": {...}}`` and echoes
    X-Request-Id. Belongs to the event loop's thread.

    Made by hand because every request of a deployment passes through three of these: a web framework's layers took more
    processor time than all that is done here.
    """

    def __init__(
        self, traffic: Traffic | None = None, *, posts_from_here: bool = False, keys: ApiKeys | None = None
    ) -> None:
        """With ``traffic``, its POSTs are counted, and refused while the daemon drains. ``posts_from_here``: only
        callers on this machine may POST. With ``keys``, whoever names none of them gets a 401."""
        self._posts_from_here = posts_from_here
        self._keys = keys
        self._open_paths: set[str] = set()
        self._handlers: dict[str, dict[str, Handler]] = {}
        inner: ASGIApp = self._answer if traffic is None else Gate(self._answer, traffic, _draining)
        self._outermost = _Outermost(inner)

    def add_route(self, path: str, handler: "Handler", method: str = "GET", *, needs_key: bool = True) -> None:
        self._handlers.setdefault(path, {})[method] = handler
        if not needs_key:
            self._open_paths.add(path)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http", "neither lifespan nor websockets are switched on"
        await self._outermost(scope, receive, send)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        has_begun = False

        async def noticing(message: Message) -> None:
            nonlocal has_begun
            has_begun = True
            await send(message)

        client = scope[_CLIENT] = Client(receive)
        try:
            response = await self._respond(scope, receive)
            await response(scope, receive, noticing)
        except (ApiError, RequestError, ClientGoneError) as exc:
            if has_begun:
                raise
            await _response_to(exc)(scope, receive, send)
        finally:
            client.forget()

    async def _respond(self, scope: Scope, receive: Receive) -> Response:
        path, method = scope["path"], scope["method"]
        if not self._may_call(path, scope):
            return _without_key()
        by_method = self._handlers.get(path)
        if by_method is None:
            raise ApiError.of(404, f"no such route: {method} {path}")
        handler = by_method.get(method)
        if handler is None:
            refused = error_response(ApiError.of(405, f"{path} does not take {method}"))
            refused.headers["Allow"] = ", ".join(by_method)
            return refused
        if method == "POST" and self._posts_from_here and not _is_here(scope):
            raise ApiError.of(403, f"{path} is for callers on this machine, or give the worker --insecure")
        return await handler(Request(scope, receive))

    def _may_call(self, path: str, scope: Scope) -> bool:
        if self._keys is None or path in self._open_paths:
            return True
        return self._keys.admits(Headers(scope=scope).get("authorization", ""))


def _is_here(scope: Scope) -> bool:
    """Whether the caller is on this machine, or in this pod: what is forwarded into a pod comes from there."""
    host, _ = scope.get("client") or ("", 0)
    return is_loopback(host.removeprefix("::ffff:"))


Handler = Callable[[Request], Awaitable[Response]]


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
    return json_response(error.encode(), error.status, headers)


def request_id(request: Request) -> str:
    """The id that the client sent, or the one made for it; it is in the logs and in the answer's headers."""
    value: str = request.scope["pdkv.request_id"]
    return value


def trace_headers(request: Request) -> dict[str, str]:
    """Those that tell whose trace the request belongs to, for the requests that are made for it; often none."""
    trace: Trace = request.scope["pdkv.trace"]
    return trace.headers


async def read_body(request: Request) -> bytes:
    """The whole body. Raises the 413 of one that is too large, without reading it all."""
    too_large = ApiError.of(413, f"the body is larger than {MAX_BODY_BYTES} bytes", code="body_too_large")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > MAX_BODY_BYTES:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGoneError
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if size > MAX_BODY_BYTES:
            raise too_large
        if not message.get("more_body", False):
            return b"".join(chunks)


class Client:
    """Whether a request's client is still there. Owned by the request's task."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._watching: asyncio.Task[None] | None = None

    def watch(self) -> asyncio.Task[None]:
        """Ends when the client has gone. The body must have been read before."""
        if self._watching is None:
            self._watching = asyncio.create_task(self._wait_until_gone())
        return self._watching

    def forget(self) -> None:
        """It has been answered."""
        if self._watching is not None:
            self._watching.cancel()

    async def _wait_until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass


class _UnlessGone:
    """Cancels the block that it stands around when the client goes, as ``asyncio.timeout`` does when time is up."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._is_over = False
        self._has_fired = False

    async def __aenter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request runs in a task"
        self._task = task
        self._num_cancelling = task.cancelling()
        self._watching = self._client.watch()
        self._watching.add_done_callback(self._fire)

    async def __aexit__(self, kind: type[BaseException] | None, exc: BaseException | None, tb: object) -> None:
        self._is_over = True
        self._watching.remove_done_callback(self._fire)
        if self._has_fired and self._task.uncancel() <= self._num_cancelling and kind is asyncio.CancelledError:
            raise ClientGoneError from exc

    def _fire(self, watching: "asyncio.Task[None]") -> None:
        if not self._is_over and not watching.cancelled():
            self._has_fired = True
            self._task.cancel()


def unless_gone(request: Request) -> _UnlessGone:
    """A block that is cancelled when the client goes; then ClientGoneError is raised. The body must have been read."""
    client: Client = request.scope[_CLIENT]
    return _UnlessGone(client)


class EventStream(Response):
    """Server-sent events, each sent as it comes; ends them when the client goes."""

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        super().__init__()
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        with contextlib.suppress(ClientGoneError):  # nobody is left to be told
            async with _UnlessGone(scope[_CLIENT]), contextlib.aclosing(self._events) as events:
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                async for event in events:
                    await send({"type": "http.response.body", "body": event, "more_body": True})
                await send({"type": "http.response.body", "body": b""})


def listen(address: Address, *, reuse_port: bool = False) -> socket.socket:
    """A socket that accepts connections from now on; they wait until ``serve``."""
    sock = bind(address, reuse_port=reuse_port)
    sock.listen(2048)
    return sock


def bind(address: Address, *, reuse_port: bool = False) -> socket.socket:
    """A bound TCP socket, not yet listening. Raises ConfigError when the address cannot be had."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # asyncio turns Nagle off only for a socket that says it is TCP, and accepted ones say what the listener says.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if reuse_port:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        sock.bind((address.host, address.port))
    except OSError as exc:
        sock.close()
        raise ConfigError(f"cannot listen on {address}: {exc.strerror or exc}") from exc
    return sock


def bound_address(sock: socket.socket) -> Address:
    host, port = sock.getsockname()[:2]
    return Address(f"{host}:{port}")


async def serve(
    app: ASGIApp,
    sock: socket.socket,
    life: Lifecycle,
    on_stop: Callable[[], None],
    tls: ssl.SSLContext | None = None,
) -> None:
    """Serve until it is time to end, call ``on_stop`` (it fails what is running), let answers out, and close. With
    ``tls``, over that alone."""
    config = _server_config(app, _GRACE_S)
    config.load()
    config.ssl = tls
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    stopping = asyncio.create_task(life.wait())
    await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    server.should_exit = True
    on_stop()
    await serving


@contextlib.asynccontextmanager
async def serving(app: ASGIApp, sock: socket.socket) -> AsyncIterator[None]:
    """Serve while the block runs."""
    server = _Server(_server_config(app, _SIDE_GRACE_S))
    task = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        yield
    finally:
        server.should_exit = True
        await task


def _server_config(app: ASGIApp, grace_s: int) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        proxy_headers=False,  # whose request it is matters to nobody here
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=grace_s,
    )


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are ``Stop``'s."""
        yield


class _Outermost:
    """Gives every request an id, in its scope, its logs and its answer, and answers what nobody caught with a 500."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        chosen = given if given and len(given) <= 128 and given.isprintable() else secrets.token_hex(16)
        trace = trace_of(headers)
        scope["pdkv.request_id"], scope["pdkv.trace"] = chosen, trace
        known = {"request_id": chosen, "trace_id": trace.id} if trace.id else {"request_id": chosen}
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (_REQUEST_ID, chosen.encode("latin-1"))]
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(**known):
            try:
                await self._app(scope, receive, send_with_id)
            except Exception:  # noqa: BLE001  a daemon's outermost loop
                _log.exception("unhandled error")
                if not status:  # otherwise the server breaks the connection off, so that nobody takes it for whole
                    bug = ApiError.of(500, "internal error; the server's log has the details", code="internal")
                    await error_response(bug)(scope, receive, send_with_id)
            log = _log.debug if scope["method"] == "GET" else _log.info
            log("request", path=scope["path"], status=status, seconds=round(time.monotonic() - began, 4))


def _draining() -> Response:
    told = "this server is about to end and takes no new request; send it again, to another one if there is one"
    return error_response(ApiError.of(503, told, code="draining", retry_after_s=1))


def _without_key() -> Response:
    message = "the request names no API key that is accepted here; send the header Authorization: Bearer KEY"
    refused = _response_to(ApiError.of(401, message, code="invalid_api_key"))
    refused.headers["WWW-Authenticate"] = "Bearer"
    return refused


def _response_to(exc: ApiError | RequestError | ClientGoneError) -> Response:
    if isinstance(exc, ClientGoneError):
        _log.info("client gone")
        return Response(status_code=499)
    note_failure(exc.body.code if isinstance(exc, ApiError) else exc.code)
    return error_response(exc if isinstance(exc, ApiError) else ApiError.from_request_error(exc))
