"""The requests of a data port: how many run, how each ended, its span where spans are recorded, and that none is taken
while the daemon drains."""

import contextvars
import time
from collections.abc import Callable

import structlog
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.trace_context import Trace
from pdkv.daemons.tracing import Span, Tracing
from pdkv.errors import FailureCode
from pdkv.metric_table import (
    IN_FLIGHT,
    NO_CODE,
    REQUEST_CODES,
    REQUEST_SECONDS,
    REQUESTS,
    ROUTER,
    TIME_TO_FIRST_TOKEN,
)
from pdkv.metrics import Meter

_CODE_OF_STATUS = {413: "body_too_large", 504: FailureCode.DEADLINE.value}


class _Request:
    """One request under way."""

    def __init__(self, span: Span | None) -> None:
        self.span = span
        self.began = time.monotonic()
        self.status = 0
        self.code = ""
        self.streams = False
        self.has_begun = False
        self.complete = False

    def outcome(self) -> tuple[str, str]:
        """Its ``result`` and ``code``."""
        if self.status == 499 or (not self.complete and not self.code):
            return "cancelled", NO_CODE
        if self.status < 400 and not self.code:
            return "ok", NO_CODE
        if self.code in REQUEST_CODES:
            return "error", self.code
        return "error", _CODE_OF_STATUS.get(self.status, "bad_request" if 400 <= self.status < 500 else "other")


_current: contextvars.ContextVar[_Request | None] = contextvars.ContextVar("pdkv_request", default=None)


def note_failure(code: str | None) -> None:
    """Say why the request that is being answered fails; the first reason stands. Harmless outside of a request."""
    request = _current.get()
    if request is not None and not request.code:
        request.code = code or "unnamed"


def current_span() -> Span | None:
    """Of the request that is being answered, where one is recorded."""
    request = _current.get()
    return None if request is None else request.span


class Traffic:
    """Counts the requests of one daemon. Belongs to the event loop's thread."""

    def __init__(self, role: str, lifecycle: Lifecycle, meter: Meter, tracing: Tracing | None = None) -> None:
        self._role = role
        self._tracing = tracing
        self._lifecycle = lifecycle
        self._meter = meter
        self.in_flight = 0

    @property
    def draining(self) -> bool:
        return self._lifecycle.draining

    def begin(self, path: str, trace: Trace, request_id: str) -> _Request:
        self.in_flight += 1
        self._meter.set(IN_FLIGHT, to=self.in_flight)
        return _Request(self._tracing.begin(path, trace, request_id) if self._tracing else None)

    def first_bytes(self, request: _Request) -> None:
        if self._role == ROUTER and request.streams and not request.has_begun:
            self._meter.observe(TIME_TO_FIRST_TOKEN, value=time.monotonic() - request.began)
        request.has_begun = True

    def end(self, request: _Request) -> None:
        self.in_flight -= 1
        self._meter.set(IN_FLIGHT, to=self.in_flight)
        result, code = request.outcome()
        self._meter.count(REQUESTS, result, code)
        self._meter.observe(REQUEST_SECONDS, result, value=time.monotonic() - request.began)
        if request.span is not None:
            request.span.end(request.status, result, code)


class Gate:
    """ASGI middleware: every POST passes here. GETs are looks at the daemon, not work, and always pass."""

    def __init__(self, app: ASGIApp, traffic: Traffic, refusal: Callable[[], Response]) -> None:
        self._app = app
        self._traffic = traffic
        self._refusal = refusal

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        app = self._app
        request = self._traffic.begin(scope["path"], scope["pdkv.trace"], scope["pdkv.request_id"])
        token = _current.set(request)
        if request.span is not None:
            trace = scope["pdkv.trace"] = request.span.trace
            structlog.contextvars.bind_contextvars(trace_id=trace.id)
        if self._traffic.draining:
            note_failure("draining")
            app = self._refusal()

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                request.status = message["status"]
                request.streams = any(
                    name == b"content-type" and value.startswith(b"text/event-stream")
                    for name, value in message["headers"]
                )
            elif message["type"] == "http.response.body":
                if message.get("body"):
                    self._traffic.first_bytes(request)
                request.complete = not message.get("more_body", False)
            await send(message)

        try:
            await app(scope, receive, watched)
        except Exception:
            note_failure(FailureCode.INTERNAL.value)
            raise
        finally:
            _current.reset(token)
            self._traffic.end(request)
