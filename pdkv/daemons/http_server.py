"""The HTTP ground that worker fronts and router stand on: error form, body limit, disconnects, shutdown."""

import asyncio
import contextlib
import secrets
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import structlog
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdkv.daemons.config import Address
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.openai_api import MAX_BODY_BYTES, ApiError
from pdkv.daemons.traffic import Gate, Traffic, note_failure
from pdkv.daemons.worker_api import REQUEST_ID
from pdkv.errors import ConfigError, RequestError

_GRACE_S = 3
"""After the end: seconds in which running requests may say that they were cancelled."""
_SIDE_GRACE_S = 1
_KEEP_ALIVE_S = 75
"""Longer than any client of ours keeps an idle connection, so that no request meets a closing one."""
CLIENT_KEEP_ALIVE_S = 30

T = TypeVar("T")
_log = structlog.get_logger(__name__)


class ClientGoneError(Exception):
    """The client closed its connection before it had its answer."""


def create_app(traffic: Traffic | None = None) -> FastAPI:
    """An app that answers every error, unknown routes included, as ``{"error": {...}}`` and echoes X-Request-Id.

    With ``traffic``, its POSTs are counted, and refused while the daemon drains.
    """
    app = FastAPI(openapi_url=None, redirect_slashes=False)
    app.add_exception_handler(ApiError, _answer_api_error)
    app.add_exception_handler(RequestError, _answer_request_error)
    app.add_exception_handler(ClientGoneError, _answer_nobody)
    app.add_exception_handler(HTTPException, _answer_http_exception)
    if traffic is not None:
        app.add_middleware(Gate, traffic=traffic, refusal=_draining)
    app.add_middleware(_Outermost)
    return app


def json_response(body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(body, status, headers, media_type="application/json")


def error_response(error: ApiError) -> Response:
    headers = {"Retry-After": str(error.retry_after_s)} if error.retry_after_s is not None else None
    return json_response(error.encode(), error.status, headers)


def request_id(request: Request) -> str:
    """The id that the client sent, or the one made for it; it is in the logs and in the answer's headers."""
    value: str = request.scope["pdkv.request_id"]
    return value


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


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``, which is cancelled (and awaited) when the client goes; then ClientGoneError is raised.

    The body must have been read before.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_wait_until_gone(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGoneError
    finally:
        for other in (task, gone):
            other.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _wait_until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


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


async def serve(app: ASGIApp, sock: socket.socket, life: Lifecycle, on_stop: Callable[[], None]) -> None:
    """Serve until it is time to end, call ``on_stop`` (it fails what is running), let answers out, and close."""
    server = _Server(_server_config(app, _GRACE_S))
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
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID, "")
        chosen = given if given and len(given) <= 128 and given.isprintable() else secrets.token_hex(16)
        scope["pdkv.request_id"] = chosen
        status = 0
        began = time.monotonic()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID] = chosen
                status = message["status"]
            await send(message)

        with structlog.contextvars.bound_contextvars(request_id=chosen):
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


def _answer_api_error(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, ApiError), "registered for nothing else"
    note_failure(exc.body.code)
    return error_response(exc)


def _answer_request_error(_request: Request, exc: Exception) -> Response:
    assert isinstance(exc, RequestError), "registered for nothing else"
    note_failure(exc.code)
    return error_response(ApiError.from_request_error(exc))


def _answer_nobody(_request: Request, _exc: Exception) -> Response:
    _log.info("client gone")
    return Response(status_code=499)


def _answer_http_exception(request: Request, exc: Exception) -> Response:
    assert isinstance(exc, HTTPException), "registered for nothing else"
    message = {
        404: f"no such route: {request.method} {request.url.path}",
        405: f"{request.url.path} does not take {request.method}",
    }.get(exc.status_code, str(exc.detail))
    response = error_response(ApiError.of(exc.status_code, message))
    response.headers.update(exc.headers or {})
    return response
