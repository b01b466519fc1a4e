"""Spans of requests, by OpenTelemetry, where its own environment variables ask for them; else nothing is loaded.

One for a request on each daemon that it passes through, and on D one for the move of its state. They hang together by
``traceparent``, which goes from the router to both workers. Spans leave on a thread of OpenTelemetry's; what a
collector does not take is dropped, and no request waits for it.
"""

import contextlib
import importlib
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import structlog

from pdkv.daemons.trace_context import Trace
from pdkv.daemons.worker_api import CHAT_PATH, PREFILL_CHAT_PATH, PREFILL_PATHS
from pdkv.metric_table import DECODE, PREFILL, ROUTER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span as OtelSpan

    from pdkv.daemons.link import TransferReport

HOW_TO_INSTALL = "pip install 'pdkv[otel]'"

_NAMES = {ROUTER: "pdkv.route", PREFILL: "pdkv.prefill", DECODE: "pdkv.decode"}
_PATHS = frozenset({*PREFILL_PATHS, *PREFILL_PATHS.values()})
_EXPORTERS = {
    "http/protobuf": "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "grpc": "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
}
_LAST_WORDS_S = 2.0
"""How long the end of a daemon may take for spans that have not left yet."""
_log = structlog.get_logger(__name__)


def is_wanted(environment: Mapping[str, str]) -> bool:
    """Whether OpenTelemetry's variables name an exporter, or where spans shall go."""
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    exporter = environment.get("OTEL_TRACES_EXPORTER", "")
    if exporter:
        return exporter == "otlp"
    return any(environment.get(f"OTEL_EXPORTER_OTLP_{which}ENDPOINT") for which in ("", "TRACES_"))


class Span:
    """A request's, under way. Owned by the request's task."""

    def __init__(self, span: "OtelSpan", tracing: "Tracing") -> None:
        self._span = span
        self._tracing = tracing
        self.trace = tracing.trace_within(span)
        """Of whatever is asked for the request's sake: it hangs below this span."""

    def note(self, attributes: Mapping[str, str | int | float | bool]) -> None:
        """Say more of the request."""
        self._span.set_attributes(attributes)

    def moved(self, report: "TransferReport") -> None:
        """D has the state of a prompt of the request: a span below this one, from Acquire to the last byte."""
        self._tracing.record(
            "pdkv.kv.transfer",
            self._span,
            (report.resident_at - report.total_s, report.resident_at),
            {
                "pdkv.bytes": report.num_bytes,
                "pdkv.pages": report.num_pages,
                "pdkv.resident_pages": report.resident_pages,
                "pdkv.regions": report.num_regions,
                "pdkv.spans": report.num_spans,
                "pdkv.path": report.path,
                "pdkv.peer": report.peer,
                "pdkv.granted_s": report.granted_s,
                "pdkv.read_s": report.read_s,
                "pdkv.exposed_s": report.exposed_s,
                "pdkv.hidden_fraction": report.hidden_fraction,
            },
        )

    def end(self, status: int, result: str, code: str) -> None:
        """``result``, ``code``: as requests are counted."""
        from opentelemetry.trace import StatusCode  # noqa: PLC0415  only where it is installed

        self._span.set_attribute("http.response.status_code", status)
        if result != "ok":
            kind = code if result == "error" else result
            self._span.set_attribute("error.type", kind)
            if result == "error":
                self._span.set_status(StatusCode.ERROR, kind)
        self._span.end()


class Tracing:
    """The spans of one daemon. Belongs to the event loop's thread."""

    def __init__(self, role: str, provider: "TracerProvider") -> None:
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415

        self._name = _NAMES[role]
        self._provider = provider
        self._tracer = provider.get_tracer("pdkv")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, path: str, trace: Trace, request_id: str) -> Span | None:
        """A request's span, below the client's if that sent one. None for paths that generate nothing."""
        if path not in _PATHS:
            return None
        from opentelemetry.trace import SpanKind  # noqa: PLC0415

        attributes = {
            "http.request.method": "POST",
            "url.path": path,
            "pdkv.request_id": request_id,
            "gen_ai.operation.name": "chat" if path in (CHAT_PATH, PREFILL_CHAT_PATH) else "text_completion",
        }
        context = self._propagator.extract(trace.headers)
        return Span(self._tracer.start_span(self._name, context, SpanKind.SERVER, attributes), self)

    def record(
        self, name: str, parent: "OtelSpan", seconds: tuple[float, float], attributes: Mapping[str, Any]
    ) -> None:
        """A span that is over. ``seconds``: its beginning and its end, since 1970."""
        from opentelemetry.trace import set_span_in_context  # noqa: PLC0415

        began, ended = (int(each * 1e9) for each in seconds)
        span = self._tracer.start_span(name, set_span_in_context(parent), attributes=attributes, start_time=began)
        span.end(ended)

    def trace_within(self, span: "OtelSpan") -> Trace:
        from opentelemetry.trace import format_trace_id, set_span_in_context  # noqa: PLC0415

        headers: dict[str, str] = {}
        self._propagator.inject(headers, set_span_in_context(span))
        return Trace(format_trace_id(span.get_span_context().trace_id), headers)

    def close(self) -> None:
        """Send what is left, if that is soon done."""
        last = threading.Thread(target=self._provider.shutdown, name="pdkv-spans", daemon=True)
        last.start()
        last.join(_LAST_WORDS_S)


@contextlib.contextmanager
def tracing(role: str) -> Iterator[Tracing | None]:
    """For as long as a daemon runs: by ``open_tracing``."""
    opened = open_tracing(role)
    try:
        yield opened
    finally:
        if opened is not None:
            opened.close()


def open_tracing(role: str, environment: Mapping[str, str] = os.environ) -> Tracing | None:
    """None where no spans are wanted, or none can be sent: then the log says why, and requests are served as ever."""
    if not is_wanted(environment):
        return None
    named = [environment.get(f"OTEL_EXPORTER_OTLP_{which}PROTOCOL", "") for which in ("TRACES_", "")]
    protocol = next(filter(None, named), "http/protobuf")
    if protocol not in _EXPORTERS:
        _log.warning("no spans", problem=f"OTEL_EXPORTER_OTLP_PROTOCOL={protocol} is none of {', '.join(_EXPORTERS)}")
        return None
    try:
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource  # noqa: PLC0415
        from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
        from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

        exporter = importlib.import_module(_EXPORTERS[protocol]).OTLPSpanExporter()
    except ImportError as exc:
        _log.warning("no spans", problem=f"{exc}; {HOW_TO_INSTALL}, or unset OTEL_*")
        return None
    named_otherwise = "OTEL_SERVICE_NAME" in environment or "service.name=" in environment.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named_otherwise else {SERVICE_NAME: f"pdkv-{role}"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    _log.info("spans are exported", protocol=protocol)
    return Tracing(role, provider)
