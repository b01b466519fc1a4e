"""The admin port: liveness and readiness with named conditions, metrics, and the drain, of real daemons."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import Script
from tests.http import HTTP

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


@pytest.fixture(scope="module")
def prefill(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("prefill", checkpoint)


@pytest.fixture(scope="module")
def decode(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("decode", checkpoint)


def _conditions(daemon: Daemon, path: str) -> tuple[int, dict[str, bool]]:
    answer = HTTP.get(daemon.admin + path)
    body = answer.json()
    assert body["ok"] == (answer.status_code == 200)
    assert all(condition["ok"] or condition["message"] for condition in body["conditions"])
    return answer.status_code, {condition["name"]: condition["ok"] for condition in body["conditions"]}


def _ready(daemon: Daemon) -> bool:
    return _conditions(daemon, "/readyz")[0] == 200


def _ask(router: Daemon, script: Script = Script.ANSWER, **fields: object) -> httpx.Response:
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(script), **fields}
    return HTTP.post(router.url + "/v1/completions", json=body, timeout=60)


@contextlib.contextmanager
def _hanging(router: Daemon) -> Iterator[Iterator[str]]:
    """A stream that goes on until it is closed, its first event behind it."""
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(Script.HANG_AFTER_TWO), "stream": True}
    with HTTP.stream("POST", router.url + "/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def _samples(daemon: Daemon) -> Samples:
    answer = HTTP.get(daemon.admin + "/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    families = text_string_to_metric_families(answer.text)
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in families for s in family.samples}


def _value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def _prefilled(daemon: Daemon) -> float:
    labels = {"role": "prefill", "result": "ok", "code": "none"}
    return _samples(daemon).get(("pdkv_requests_total", tuple(sorted(labels.items()))), 0)


def test_a_worker_names_its_conditions(decode: Daemon) -> None:
    wait_until(lambda: _ready(decode))
    assert _conditions(decode, "/livez") == (200, {"event_loop": True, "engine_thread": True, "agent_thread": True})
    names = {"model_loaded", "regions_registered", "engine_progress", "not_draining"}
    assert _conditions(decode, "/readyz") == (200, dict.fromkeys(names, True))


def test_liveness_of_a_router_does_not_hang_on_its_workers(fleet: Fleet) -> None:
    nobody = Daemon.__new__(Daemon)
    nobody.url = "http://127.0.0.1:1"
    router = fleet.router([nobody], [nobody], ready=False)
    assert _conditions(router, "/livez") == (200, {"event_loop": True})
    assert _conditions(router, "/readyz") == (503, {"workers": False, "not_draining": True})


def test_a_worker_whose_engine_process_stands_still_is_not_live(fleet: Fleet, checkpoint: Path) -> None:
    worker = fleet.worker("prefill", checkpoint, stall_timeout=1.5)
    wait_until(lambda: _ready(worker))
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    (engine,) = map(int, children)
    os.kill(engine, signal.SIGSTOP)
    wait_until(lambda: _conditions(worker, "/livez")[0] == 503)
    assert not HTTP.get(worker.url + "/pdkv/v1/info").json()["ready"]
    assert _value(_samples(worker), "pdkv_live", role="prefill") == 0
    os.kill(engine, signal.SIGCONT)
    wait_until(lambda: _conditions(worker, "/livez")[0] == 200)


def test_every_request_is_counted_where_it_went(fleet: Fleet, checkpoint: Path) -> None:
    prefill, decode = fleet.worker("prefill", checkpoint), fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [decode], "--retries=1")
    assert [_ask(router, stream=stream).status_code for stream in (False, True, False)] == [200] * 3
    assert _ask(router, temperature="hot").status_code == 400
    assert _ask(router, Script.FULL).status_code == 503
    wait_until(lambda: not _value(_samples(prefill), "pdkv_requests_in_flight", role="prefill"))
    # The script's D answers without waiting for P, which then counts what the router no longer waits for as cancelled.
    before = _prefilled(prefill)
    assert before <= 3
    with _hanging(router):
        wait_until(lambda: _value(_samples(router), "pdkv_requests_in_flight", role="router") == 1)
        # D's first event may be here before P's answer or its question, and a client that goes takes both along.
        wait_until(lambda: _prefilled(prefill) == before + 1)
        wait_until(lambda: _value(_samples(decode), "pdkv_generation_tokens_total", role="decode") == 3 * 4 + 2)
    wait_until(lambda: _value(_samples(decode), "pdkv_requests_total", role="decode", result="cancelled", code="none"))
    for daemon, role in ((router, "router"), (decode, "decode"), (prefill, "prefill")):  # counted behind the answer
        wait_until(lambda d=daemon, r=role: not _value(_samples(d), "pdkv_requests_in_flight", role=r))
    for daemon, role in ((router, "router"), (decode, "decode")):
        samples = _samples(daemon)
        assert _value(samples, "pdkv_requests_total", role=role, result="ok", code="none") == 3
        assert _value(samples, "pdkv_requests_total", role=role, result="error", code="bad_request") == 1
        assert _value(samples, "pdkv_requests_total", role=role, result="cancelled", code="none") == 1
        assert _value(samples, "pdkv_request_duration_seconds_count", role=role, result="ok") == 3
        assert _value(samples, "pdkv_requests_in_flight", role=role) == 0
        assert _value(samples, "pdkv_ready", role=role) == 1
    assert _value(_samples(decode), "pdkv_generation_tokens_total", role="decode") == 3 * 4 + 2
    assert _value(_samples(decode), "pdkv_time_to_first_token_seconds_count", role="decode") == 4
    assert _value(_samples(decode), "pdkv_inter_token_latency_seconds_count", role="decode") == 3 * 3 + 1
    assert _value(_samples(decode), "pdkv_requests_total", role="decode", result="error", code="no_capacity") == 2
    assert _prefilled(prefill) == before + 1
    routed = _samples(router)
    assert _value(routed, "pdkv_requests_total", role="router", result="error", code="no_capacity") == 1
    assert _value(routed, "pdkv_router_route_decisions_total", role="router", decision="pd") == 7
    assert _value(routed, "pdkv_router_retries_total", role="router") == 1
    answers = {"role": "router", "upstream": "decode"}
    assert _value(routed, "pdkv_router_upstream_responses_total", status="2xx", **answers) == 4
    assert _value(routed, "pdkv_router_upstream_responses_total", status="5xx", **answers) == 2


@pytest.mark.parametrize("role", ["router", "decode"])
def test_a_signal_drains(fleet: Fleet, checkpoint: Path, prefill: Daemon, decode: Daemon, role: str) -> None:
    """What runs goes on, what comes is refused, and the end comes when the last is over."""
    own = fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [own])
    drained = router if role == "router" else own
    with _hanging(router) as events:
        drained.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not _ready(drained))
        assert _conditions(drained, "/livez")[0] == 200
        refused = _ask(router)
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert next(line for line in events if line).startswith('data: {"id"')  # still streaming
        assert drained.process.poll() is None
    assert drained.process.wait(timeout=60) == 143


def test_a_drain_that_takes_too_long_is_broken_off_with_an_exit_code_of_its_own(
    fleet: Fleet, prefill: Daemon, decode: Daemon
) -> None:
    router = fleet.router([prefill], [decode], "--drain-timeout=0.5")
    with _hanging(router) as events:
        router.process.send_signal(signal.SIGTERM)
        assert any('"shutdown"' in line for line in events)
    assert router.process.wait(timeout=60) == 7


def test_a_worker_drained_by_post_is_left_out_and_lives_on(fleet: Fleet, checkpoint: Path, prefill: Daemon) -> None:
    decodes = [fleet.worker("decode", checkpoint) for _ in range(2)]
    router = fleet.router([prefill], decodes)
    wait_until(lambda: all(worker["ready"] for worker in HTTP.get(router.url + "/health").json()["workers"]))
    assert HTTP.post(decodes[0].admin + "/drain").json() == {"draining": True, "in_flight": 0}
    assert {_ask(router).status_code for _ in range(6)} == {200}  # also before the router has noticed
    wait_until(lambda: '"problem":"draining"' in HTTP.get(router.url + "/health").text)
    assert _value(_samples(decodes[0]), "pdkv_draining", role="decode") == 1
    assert _value(_samples(router), "pdkv_router_workers_ready", role="router", upstream="decode") == 1
    assert decodes[0].process.poll() is None
    decodes[0].process.send_signal(signal.SIGTERM)
    assert decodes[0].process.wait(timeout=60) == 143
