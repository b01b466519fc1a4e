"""The router over real HTTP: real fronts, real failures of processes, and the real OpenAI client."""

import json
import os
import signal
import threading
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest

from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.held_way import held_way
from tests.daemons.scripted_engine import FIRST_NODE, Script
from tests.http import HTTP
from tests.ports import free_port


@pytest.fixture(scope="module")
def prefill(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("prefill", checkpoint)


@pytest.fixture(scope="module")
def decode(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("decode", checkpoint)


@pytest.fixture(scope="module")
def router(shared_fleet: Fleet, prefill: Daemon, decode: Daemon) -> Daemon:
    return shared_fleet.router([prefill], [decode])


@pytest.fixture
def client(router: Daemon):
    with openai.OpenAI(base_url=router.url + "/v1", api_key="none", max_retries=0) as client:
        yield client


def _body(script: Script = Script.ANSWER, **fields: object) -> dict:
    return {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(script), **fields}


def _ask(router: Daemon, script: Script = Script.ANSWER, **fields: object) -> httpx.Response:
    return HTTP.post(router.url + "/v1/completions", json=_body(script, **fields), timeout=60)


def _status(worker: Daemon) -> dict:
    return HTTP.get(worker.url + "/pdkv/v1/status").json()


def _idle(*workers: Daemon) -> bool:
    return all(_status(worker)["pages_free"] == 10 for worker in workers)


def test_the_openai_client_gets_whole_answers_and_streams(client: openai.OpenAI) -> None:
    whole = client.completions.create(model="link-chasing", prompt="n1>n2 n1", max_tokens=4, seed=1)
    assert whole.choices[0].text == "n0 n1 n2 n3"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage
    assert whole.usage.total_tokens == 6
    chunks = list(client.completions.create(model="link-chasing", prompt=[1, 2], max_tokens=4, seed=1, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "n0 n1 n2 n3"
    assert client.models.list().data[0].id == "link-chasing"


def test_refusals_reach_the_openai_client_as_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="n1", seed=1)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="link-chasing", prompt=[1] * 600, seed=1)
    assert (too_long.value.code, too_long.value.param) == ("context_length_exceeded", "prompt")
    with pytest.raises(openai.InternalServerError) as full:
        client.completions.create(model="link-chasing", prompt=[1], seed=int(Script.FULL))
    assert full.value.status_code == 503
    assert full.value.response.headers["retry-after"] == "1"


def test_a_request_id_is_echoed_and_debug_is_passed_down(router: Daemon) -> None:
    answer = HTTP.post(
        router.url + "/v1/completions", json=_body(), headers={"X-Request-Id": "mine", "X-Pdkv-Debug": "1"}
    )
    assert answer.headers["x-request-id"] == "mine"
    assert answer.json()["pdkv"]["request_id"] == "mine"


def test_a_trace_is_in_the_logs_of_router_and_both_workers(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    trace = "4bf92f3577b34da6a3ce929d0e0e4736"
    parent = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01"}
    answer = HTTP.post(router.url + "/v1/completions", json=_body(), headers=parent)
    transfers = set()
    for daemon in (router, decode, prefill):
        while (line := daemon.wait_for_event("request")).get("trace_id") != trace:
            assert "trace_id" not in line, "other requests have no trace"
        assert line["request_id"] == answer.headers["x-request-id"]
        transfers.add(line["transfer"])
    assert len(transfers) == 1


def test_a_stream_is_passed_on_as_it_comes(router: Daemon, decode: Daemon, prefill: Daemon) -> None:
    body = _body(Script.HANG_AFTER_TWO, stream=True)
    with HTTP.stream("POST", router.url + "/v1/completions", json=body, timeout=60) as answer:
        events = (line for line in answer.iter_lines() if line)
        texts = [json.loads(next(events).removeprefix("data: "))["choices"][0]["text"] for _ in range(2)]
        assert texts == ["n0", " n1"]
        assert _status(decode)["requests_running"] == 1
    wait_until(lambda: _idle(decode, prefill))  # the client has gone: both sides hear of it


@pytest.mark.parametrize("script", [Script.HANG, Script.HANG_PREFILL])
def test_a_client_that_goes_away_frees_both_workers(
    router: Daemon, decode: Daemon, prefill: Daemon, script: Script
) -> None:
    with pytest.raises(httpx.ReadTimeout):
        HTTP.post(router.url + "/v1/completions", json=_body(script), timeout=0.5)
    wait_until(lambda: _idle(decode, prefill))


@pytest.mark.parametrize("stream", [False, True])
def test_a_prefill_answer_that_comes_after_all_of_decodes_leaves_its_connection_for_the_next_request(
    fleet: Fleet, decode: Daemon, prefill: Daemon, *, stream: bool
) -> None:
    with held_way(prefill.url) as way:
        router = fleet.router([SimpleNamespace(url=way.url)], [decode])
        for _ in range(3):
            way.let_go.clear()
            assert _ask(router, stream=stream).status_code == 200
            way.let_go.set()
            wait_until(lambda: _idle(decode, prefill))
        answered = 'upstream_responses_total{role="router",status="2xx",upstream="prefill"} 3'
        wait_until(lambda: way.num_dropped or answered in HTTP.get(router.admin + "/metrics").text)
        assert (way.num_posts, way.num_dropped) == (3, 0)


def test_a_prefill_whose_request_decode_refuses_is_dropped(fleet: Fleet, decode: Daemon, prefill: Daemon) -> None:
    with held_way(prefill.url) as way:
        router = fleet.router([SimpleNamespace(url=way.url)], [decode])
        assert _ask(router, Script.FULL).status_code == 503
        wait_until(lambda: way.num_dropped > 0)
        wait_until(lambda: _idle(prefill))


def test_a_failed_prefill_cancels_decode_and_ends_in_its_error(router: Daemon, decode: Daemon) -> None:
    answer = _ask(router, Script.PREFILL_FAILS)
    assert answer.status_code == 500
    assert answer.json()["error"]["message"] == "scripted: internal"
    wait_until(lambda: _idle(decode))


def test_unready_says_what_is_missing(fleet: Fleet, prefill: Daemon, decode: Daemon) -> None:
    nobody = Daemon.__new__(Daemon)
    nobody.url = "http://127.0.0.1:1"
    router = fleet.router([prefill], [nobody], ready=False)

    def seen() -> bool:
        """The router has asked both, in whichever order."""
        text = HTTP.get(router.url + "/health").text
        return "cannot connect" in text and "no prefill worker" not in text

    wait_until(seen)
    health = HTTP.get(router.url + "/health")
    assert health.status_code == 503
    assert health.json()["missing"][0].startswith("no decode worker is ready (http://127.0.0.1:1")
    refused = _ask(router)
    assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
    assert HTTP.get(router.url + "/v1/models").status_code == 503
    swapped = fleet.router([decode], [prefill], ready=False)
    wait_until(lambda: "is a decode worker" in HTTP.get(swapped.url + "/health").text)


def test_workers_of_different_manifests_are_never_paired(
    fleet: Fleet, prefill: Daemon, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "other").symlink_to(checkpoint)
    stranger = fleet.worker("decode", tmp_path / "other")
    router = fleet.router([prefill], [stranger], ready=False)
    wait_until(lambda: "same manifest" in HTTP.get(router.url + "/health").text)
    assert HTTP.get(router.url + "/health").status_code == 503


def test_workers_that_would_read_a_prompt_differently_are_never_paired(
    fleet: Fleet, prefill: Daemon, checkpoint: Path, tmp_path: Path
) -> None:
    for path in checkpoint.iterdir():
        (tmp_path / path.name).symlink_to(path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[-1].content }}")
    stranger = fleet.worker("decode", tmp_path)
    router = fleet.router([prefill], [stranger], ready=False)
    wait_until(lambda: "same tokenizer" in HTTP.get(router.url + "/health").text)
    assert HTTP.get(router.url + "/health").status_code == 503


def test_a_deadline_ends_a_request_with_504_and_frees_both(fleet: Fleet, prefill: Daemon, decode: Daemon) -> None:
    router = fleet.router([prefill], [decode], "--request-timeout=4")  # the second request begins to stream before
    answer = _ask(router, Script.HANG)
    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline")
    events = _ask(router, Script.HANG_AFTER_TWO, stream=True).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "deadline"
    wait_until(lambda: _idle(decode, prefill))


def test_every_worker_gets_its_turn(fleet: Fleet, checkpoint: Path) -> None:
    prefills = [fleet.worker("prefill", checkpoint) for _ in range(2)]
    decodes = [fleet.worker("decode", checkpoint) for _ in range(2)]
    router = fleet.router(prefills, decodes)
    wait_until(lambda: all(worker["ready"] for worker in HTTP.get(router.url + "/health").json()["workers"]))
    controllers = [_hang(router) for _ in range(4)]
    wait_until(lambda: [_status(worker)["requests_running"] for worker in decodes] == [2, 2])
    for controller in controllers:
        controller.close()
    wait_until(lambda: _idle(*decodes, *prefills))


def _hang(router: Daemon) -> httpx.Client:
    client = httpx.Client(timeout=60)
    request = client.build_request(
        "POST", router.url + "/v1/completions", json=_body(Script.HANG_AFTER_TWO, stream=True)
    )
    client.send(request, stream=True)
    return client


def test_a_dead_prefill_is_passed_over_and_taken_back_after_its_restart(fleet: Fleet, checkpoint: Path) -> None:
    port = free_port()
    first, second = fleet.worker("prefill", checkpoint, port), fleet.worker("prefill", checkpoint)
    decode = fleet.worker("decode", checkpoint)
    router = fleet.router([first, second], [decode])
    wait_until(lambda: all(worker["ready"] for worker in HTTP.get(router.url + "/health").json()["workers"]))
    first.process.kill()
    first.process.wait()
    assert [_ask(router).status_code for _ in range(4)] == [200] * 4
    second.process.kill()
    second.process.wait()
    refused = _ask(router, Script.HANG)  # a decode worker has nothing to say without a prefill worker
    assert refused.status_code in (502, 503)
    assert "error" in refused.json()
    fleet.worker("prefill", checkpoint, port)
    wait_until(lambda: HTTP.get(router.url + "/health").status_code == 200)
    assert _ask(router).json()["choices"][0]["text"] == "n0 n1 n2 n3"
    assert decode.process.poll() is None


def test_a_prefill_that_dies_while_it_computes_gives_an_error_and_frees_decode(fleet: Fleet, checkpoint: Path) -> None:
    prefill, decode = fleet.worker("prefill", checkpoint), fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [decode])
    answer = _ask(router, Script.DIE_PREFILL)
    assert answer.status_code in (502, 503)
    told = answer.json()["error"]["code"]
    assert told in ("peer_lost", "shutdown", "draining")  # the last where a new try meets the front while it ends
    wait_until(lambda: _idle(decode))


def test_a_decode_that_dies_in_a_stream_ends_it_with_an_error_event(fleet: Fleet, checkpoint: Path) -> None:
    prefill, decode = fleet.worker("prefill", checkpoint), fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [decode])
    with HTTP.stream(
        "POST", router.url + "/v1/completions", json=_body(Script.HANG_AFTER_TWO, stream=True), timeout=60
    ) as answer:
        lines = (line for line in answer.iter_lines() if line)
        next(lines)
        next(lines)
        decode.process.kill()
        rest = list(lines)
    assert "error" in json.loads(rest[-1].removeprefix("data: "))
    assert "data: [DONE]" not in rest
    wait_until(lambda: _idle(prefill))


def test_a_stopped_worker_costs_no_more_than_the_deadline(fleet: Fleet, prefill: Daemon, checkpoint: Path) -> None:
    decode = fleet.worker("decode", checkpoint)
    router = fleet.router([prefill], [decode], "--request-timeout=1")
    os.kill(decode.process.pid, signal.SIGSTOP)
    assert _ask(router).status_code in (503, 504)
    wait_until(lambda: _idle(prefill))


@pytest.mark.parametrize("stream", [False, True])
def test_a_second_signal_ends_the_router_and_tells_its_clients(
    fleet: Fleet, prefill: Daemon, decode: Daemon, stream: bool
) -> None:
    router = fleet.router([prefill], [decode])
    answers: list[httpx.Response] = []
    script = Script.HANG_AFTER_TWO if stream else Script.HANG
    thread = threading.Thread(target=lambda: answers.append(_ask(router, script, stream=stream)))
    thread.start()
    wait_until(lambda: not _idle(decode))
    router.process.send_signal(signal.SIGTERM)
    wait_until(lambda: HTTP.get(router.admin + "/readyz").status_code == 503)
    router.process.send_signal(signal.SIGTERM)
    thread.join()
    assert '"shutdown"' in answers[0].text
    assert stream or answers[0].status_code == 503
    assert router.process.wait(timeout=60) == 143
    wait_until(lambda: _idle(decode, prefill))


def test_ids_come_back_when_asked_for(router: Daemon) -> None:
    choice = _ask(router, return_token_ids=True).json()["choices"][0]
    assert choice["token_ids"] == [FIRST_NODE + i for i in range(4)]


# ---- clients with keys

KEY = "sk-router-0123456789"


@pytest.fixture(scope="module")
def guarded(
    shared_fleet: Fleet, prefill: Daemon, decode: Daemon, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Daemon, Path]:
    keys = tmp_path_factory.mktemp("keys") / "api-keys"
    keys.write_text(KEY + "\n")
    return shared_fleet.router([prefill], [decode], f"--api-keys={keys}"), keys


def test_the_openai_client_needs_a_key_where_there_are_keys(guarded: tuple[Daemon, Path]) -> None:
    router, _ = guarded
    with openai.OpenAI(base_url=router.url + "/v1", api_key=KEY, max_retries=0) as client:
        whole = client.completions.create(model="link-chasing", prompt="n1>n2 n1", max_tokens=4, seed=1)
        assert whole.choices[0].text == "n0 n1 n2 n3"
        chunks = list(client.completions.create(model="link-chasing", prompt=[1], max_tokens=4, seed=1, stream=True))
        assert "".join(chunk.choices[0].text for chunk in chunks) == "n0 n1 n2 n3"
        assert client.models.list().data[0].id == "link-chasing"
    with openai.OpenAI(base_url=router.url + "/v1", api_key="sk-wrong-0123456789", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as refused:
            client.completions.create(model="link-chasing", prompt="n1", seed=1)
        assert (refused.value.code, refused.value.type) == ("invalid_api_key", "invalid_request_error")
        assert refused.value.response.headers["www-authenticate"] == "Bearer"
        assert refused.value.response.headers["x-request-id"]
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_without_a_key_only_probes_are_answered(guarded: tuple[Daemon, Path]) -> None:
    router, _ = guarded
    for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
        assert HTTP.post(router.url + path, json=_body()).status_code == 401, path
    for path in ("/v1/models", "/tokenizer_info", "/no/such/path"):
        assert HTTP.get(router.url + path).status_code == 401, path
    for path in ("/health", "/version"):
        assert HTTP.get(router.url + path).status_code == 200, path
    metrics = HTTP.get(router.admin + "/metrics").text
    assert 'pdkv_requests_total{code="invalid_api_key",result="error",role="router"}' in metrics


def test_a_key_that_left_the_file_is_refused(guarded: tuple[Daemon, Path]) -> None:
    router, keys = guarded
    ask = {"url": router.url + "/v1/models", "headers": {"Authorization": "Bearer sk-next-0123456789"}}
    assert HTTP.get(**ask).status_code == 401
    keys.write_text("sk-next-0123456789\n")
    assert HTTP.get(**ask).status_code == 200
    assert HTTP.get(ask["url"], headers={"Authorization": f"Bearer {KEY}"}).status_code == 401
    keys.write_text(KEY + "\n")
    assert HTTP.get(ask["url"], headers={"Authorization": f"Bearer {KEY}"}).status_code == 200
