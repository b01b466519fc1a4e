"""Spans of real daemons, as a collector of OTLP over HTTP gets them."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from structlog.testing import capture_logs

from pdkv.daemons.tracing import is_wanted, open_tracing
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import Script
from tests.http import HTTP

TRACE, CLIENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NAMES = ("pdkv.route", "pdkv.prefill", "pdkv.decode", "pdkv.kv.transfer")
NOBODY = "http://127.0.0.1:9"


class Collector:
    """Takes spans until the context is left."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Span]] = []
        """With the name of the service."""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                assert self.path == "/v1/traces"
                collector.take(self.rfile.read(int(self.headers["Content-Length"])))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = (
                each.value.string_value for each in resource.resource.attributes if each.key == "service.name"
            )
            self.spans += [(service, span) for scope in resource.scope_spans for span in scope.spans]

    def __enter__(self) -> "Collector":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def of(self, trace: str, *names: str) -> list[tuple[str, Span]]:
        """All spans of a trace, once there is one of each name."""
        found: list[tuple[str, Span]] = []

        def complete() -> bool:
            found[:] = [(service, span) for service, span in self.spans if span.trace_id.hex() == trace]
            return {span.name for _, span in found} >= {*names}

        wait_until(complete)
        return found


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def router(shared_fleet: Fleet, checkpoint: Path, collector: Collector) -> Iterator[Daemon]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        workers = [shared_fleet.worker(role, checkpoint) for role in ("prefill", "decode")]
        yield shared_fleet.router(workers[:1], workers[1:])


def ask(router: Daemon, trace: str, script: Script = Script.ANSWER, **fields: object) -> httpx.Response:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(script), **fields}
    headers = {"traceparent": f"00-{trace}-{CLIENT}-01", "x-request-id": "mine"}
    return HTTP.post(router.url + "/v1/completions", json=body, headers=headers, timeout=60)


def attributes(span: Span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_is_one_tree_from_the_client_down_to_the_transfer(
    router: Daemon, collector: Collector, *, stream: bool
) -> None:
    trace = f"{TRACE[:-1]}{stream:x}"
    began = time.time()
    assert ask(router, trace, stream=stream).status_code == 200
    found = collector.of(trace, *NAMES)
    services = ["pdkv-router", "pdkv-prefill", "pdkv-decode", "pdkv-decode"]
    assert sorted((span.name, service) for service, span in found) == sorted(zip(NAMES, services, strict=True))
    by_name = {span.name: span for _, span in found}
    route, prefill, decode, moved = (by_name[name] for name in NAMES)
    assert route.parent_span_id.hex() == CLIENT
    assert prefill.parent_span_id == decode.parent_span_id == route.span_id
    assert moved.parent_span_id == decode.span_id
    transfers = {attributes(span)["pdkv.transfer"] for span in (route, prefill, decode)}
    assert len(transfers) == 1
    told = attributes(decode)
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (3, 4)
    assert (told["pdkv.request_id"], told["http.response.status_code"]) == ("mine", 200)
    told = attributes(moved)
    assert (told["pdkv.bytes"], told["pdkv.path"], told["pdkv.peer"]) == (128, "tcp", "peer")
    assert moved.end_time_unix_nano - moved.start_time_unix_nano == pytest.approx(0.2e9, abs=1e6)
    assert began < moved.end_time_unix_nano / 1e9 < time.time()
    assert all(span.status.code == Status.STATUS_CODE_UNSET for span in (route, prefill, decode, moved))


def test_a_failure_says_which(router: Daemon, collector: Collector) -> None:
    trace = f"{TRACE[:-1]}a"
    assert ask(router, trace, Script.PREFILL_FAILS).status_code == 500
    found = [span for _, span in collector.of(trace, *NAMES[:3])]  # of each try that the router made
    (route,) = [span for span in found if span.name == "pdkv.route"]
    assert route.status.code == Status.STATUS_CODE_ERROR
    assert (attributes(route)["error.type"], attributes(route)["http.response.status_code"]) == ("internal", 500)
    assert {span.parent_span_id for span in found if span is not route} == {route.span_id}
    assert {attributes(span)["error.type"] for span in found if span.name == "pdkv.prefill"} == {"internal"}
    assert {attributes(span)["error.type"] for span in found if span.name == "pdkv.decode"} == {"cancelled"}


def test_whom_the_client_does_not_want_recorded_is_not(router: Daemon, collector: Collector) -> None:
    """By the flag of its parent, which is how OpenTelemetry samples unless it is told otherwise."""
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(Script.ANSWER)}
    silent, told = f"{TRACE[:-1]}b", f"{TRACE[:-1]}c"
    headers = {"traceparent": f"00-{silent}-{CLIENT}-00"}
    assert HTTP.post(router.url + "/v1/completions", json=body, headers=headers, timeout=60).status_code == 200
    assert HTTP.post(router.url + "/tokenize", json={"prompt": "n1>n2"}, timeout=60).status_code == 200
    assert ask(router, told).status_code == 200
    collector.of(told, *NAMES)
    assert not any(span.trace_id.hex() == silent for _, span in collector.spans)
    assert {span.name for _, span in collector.spans} == {*NAMES}


def test_without_a_collector_requests_are_answered_and_the_end_comes_soon(
    fleet: Fleet, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", NOBODY)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    prefill, decode = fleet.worker("prefill", checkpoint), fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [decode])
    assert [ask(router, TRACE).status_code for _ in range(3)] == [200] * 3
    for daemon in (router, decode, prefill):
        daemon.process.send_signal(signal.SIGTERM)
        assert daemon.process.wait(60) == 143


@pytest.mark.parametrize(
    ("variables", "wanted"),
    [
        ({}, False),
        ({"OTEL_SERVICE_NAME": "mine"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": NOBODY}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": NOBODY}, False),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "none", "OTEL_EXPORTER_OTLP_ENDPOINT": NOBODY}, False),
        ({"OTEL_SDK_DISABLED": "True", "OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_opentelemetrys_own_variables_say_whether(variables: dict[str, str], *, wanted: bool) -> None:
    assert is_wanted(variables) == wanted


def test_what_cannot_be_exported_is_said_once_and_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_tracing("decode", {}) is None
    with capture_logs() as logs:
        assert (
            open_tracing("decode", {"OTEL_TRACES_EXPORTER": "otlp", "OTEL_EXPORTER_OTLP_PROTOCOL": "carrier"}) is None
        )
        monkeypatch.setitem(sys.modules, "opentelemetry.sdk.resources", None)
        assert open_tracing("decode", {"OTEL_TRACES_EXPORTER": "otlp"}) is None
    assert [line["event"] for line in logs] == ["no spans", "no spans"]
    assert "carrier" in logs[0]["problem"]
    assert "pip install 'pdkv[otel]'" in logs[1]["problem"]
