"""A worker's front over real HTTP, above an engine process that follows a script."""

import json
import secrets
import signal
from pathlib import Path

import httpx
import pytest

from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import FIRST_NODE, Script
from tests.http import HTTP


@pytest.fixture(scope="module")
def prefill(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return _ready(shared_fleet.worker("prefill", checkpoint))


@pytest.fixture(scope="module")
def decode(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return _ready(shared_fleet.worker("decode", checkpoint))


def _ready(worker: Daemon) -> Daemon:
    wait_until(lambda: _info(worker)["ready"])
    return worker


def _info(worker: Daemon) -> dict:
    return HTTP.get(worker.url + "/pdkv/v1/info").json()


def _headers(**more: str) -> dict[str, str]:
    return {
        "x-pdkv-transfer": secrets.token_hex(16),
        "x-pdkv-deadline": "30",
        "x-pdkv-prefill-control": "tcp://127.0.0.1:9",
        "x-pdkv-prefill-incarnation": "00",
        **more,
    }


def _body(script: Script = Script.ANSWER, **fields: object) -> dict:
    return {"model": "link-chasing", "prompt": [1, 2, 3], "max_tokens": 5, "seed": int(script), **fields}


def _complete(worker: Daemon, body: object, headers: dict[str, str] | None = None) -> httpx.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HTTP.post(worker.url + "/v1/completions", content=content, headers=headers or _headers())


def _error(response: httpx.Response) -> dict:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_info_health_models_and_status(decode: Daemon) -> None:
    info = _info(decode)
    assert (info["role"], info["model"], info["max_model_len"]) == ("decode", "link-chasing", 512)
    assert len(info["incarnation"]) == 16
    assert HTTP.get(decode.url + "/health").status_code == 200
    assert HTTP.get(decode.url + "/v1/models").json()["data"][0]["id"] == "link-chasing"
    assert HTTP.get(decode.url + "/pdkv/v1/status").json()["pages_free"] == 10


def test_a_whole_answer(decode: Daemon) -> None:
    answer = _complete(decode, _body(return_token_ids=True), _headers(**{"x-request-id": "mine", "x-pdkv-debug": "1"}))
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine"
    body = answer.json()
    assert body["choices"] == [
        {
            "text": "n0 n1 n2 n3 n4",
            "index": 0,
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": [FIRST_NODE + i for i in range(5)],
        }
    ]
    counts = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert body["usage"] == {**counts, "prompt_tokens_details": {"cached_tokens": 2}}
    assert body["pdkv"]["transfer"]["bytes_by_region"] == {"k": 64, "v": 64}
    assert body["pdkv"]["request_id"] == "mine"
    plain = _complete(decode, _body()).json()
    assert "pdkv" not in plain
    assert "token_ids" not in plain["choices"][0]


def test_a_stream(decode: Daemon) -> None:
    body = _body(stream=True, stream_options={"include_usage": True}, return_token_ids=True)
    answer = _complete(decode, body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")]
    assert events[-2:] == ["[DONE]", ""]
    *chunks, last = [json.loads(event) for event in events[:-2]]
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 5
    assert all(chunk["usage"] is None for chunk in chunks)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "n0 n1 n2 n3 n4"
    assert [i for chunk in chunks for i in chunk["choices"][0]["token_ids"]] == [FIRST_NODE + i for i in range(5)]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 5 + ["length"]


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        (_body(model="nope"), 404, "model", "model_not_found"),
        (_body(max_tokens=True), 400, "max_tokens", None),
        (_body(prompt=[1, 4224]), 400, "prompt", None),
        (_body(prompt=[1] * 600), 400, "prompt", "context_length_exceeded"),
        (_body(max_tokens=510), 400, "max_tokens", "context_length_exceeded"),
        (_body(prompt=["n1", 5]), 400, "prompt", None),
        (_body(prompt=[[1, 2], []]), 400, "prompt", None),
        (_body(prompt=["n1"] * 129), 400, "prompt", None),
        (_body(n=0), 400, "n", None),
        (_body(best_of=2), 400, "best_of", "unsupported_parameter"),
        (_body(presence_penalty=0.5), 400, "presence_penalty", "unsupported_parameter"),
        (_body(Script.FULL), 503, None, "no_capacity"),
        (b"{", 400, None, None),
    ],
)
def test_refusals(decode: Daemon, body: object, status: int, param: str | None, code: str | None) -> None:
    answer = _complete(decode, body)
    error = _error(answer)
    assert (answer.status_code, error["param"], error["code"]) == (status, param, code)
    assert ("retry-after" in answer.headers) == (status == 503)


def test_other_routes_have_the_same_error_form(decode: Daemon, prefill: Daemon) -> None:
    for worker, method, path, status in (
        (decode, "GET", "/nope", 404),
        (decode, "GET", "/v1/completions", 405),
        (decode, "POST", "/pdkv/v1/prefill", 404),
        (prefill, "POST", "/v1/completions", 404),
    ):
        answer = httpx.request(method, worker.url + path)
        assert answer.status_code == status
        assert _error(answer)["type"] == "invalid_request_error"


def test_a_worker_sends_clients_to_the_router(decode: Daemon) -> None:
    answer = _complete(decode, _body(), {"x-request-id": "1"})
    assert answer.status_code == 400
    assert "router" in _error(answer)["message"]


def test_a_giant_body_is_refused_unread(decode: Daemon) -> None:
    answer = HTTP.post(decode.url + "/v1/completions", content=b" " * (33 << 20), headers=_headers())
    assert answer.status_code == 413


def test_prefill_answers_when_the_state_is_ready(prefill: Daemon) -> None:
    answer = HTTP.post(
        prefill.url + "/pdkv/v1/prefill", json=_body(prompt="n1>n2 n1"), headers=_prefill_headers(prefill)
    )
    assert (answer.status_code, answer.json()) == (200, {"prompt_tokens": 2})


def test_prefill_refuses_a_request_meant_for_its_former_life(prefill: Daemon) -> None:
    answer = HTTP.post(prefill.url + "/pdkv/v1/prefill", json=_body(), headers=_headers())
    assert answer.status_code == 503
    assert _error(answer)["code"] == "stale_incarnation"


def _prefill_headers(prefill: Daemon) -> dict[str, str]:
    return _headers(**{"x-pdkv-prefill-incarnation": _info(prefill)["incarnation"]})


@pytest.mark.parametrize("script", [Script.HANG, Script.HANG_AFTER_TWO])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_aborts_its_job(decode: Daemon, script: Script, stream: bool) -> None:
    aborted = _status(decode)["messages_dropped"]
    with (
        pytest.raises(httpx.ReadTimeout),
        HTTP.stream(
            "POST", decode.url + "/v1/completions", json=_body(script, stream=stream), headers=_headers(), timeout=0.5
        ) as answer,
    ):
        answer.read()
    wait_until(lambda: _status(decode)["pages_free"] == 10)
    assert _status(decode)["messages_dropped"] == aborted + 1


def test_a_failure_in_a_stream_is_an_event_and_in_a_whole_answer_a_status(decode: Daemon) -> None:
    events = _complete(decode, _body(Script.FAIL_AFTER_TWO, stream=True)).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "internal"
    assert "[DONE]" not in "".join(events)
    assert _complete(decode, _body(Script.FAIL_AFTER_TWO)).status_code == 500


def _status(worker: Daemon) -> dict:
    return HTTP.get(worker.url + "/pdkv/v1/status").json()


def test_without_a_tokenizer_only_ids_are_served(fleet: Fleet, bare_checkpoint: Path) -> None:
    worker = _ready(fleet.worker("decode", bare_checkpoint))
    refused = _complete(worker, {"prompt": "hello", "seed": 1})
    assert refused.status_code == 400
    assert "tokenizer" in _error(refused)["message"]
    assert _error(_complete(worker, {"prompt": [1], "stop": "x"}))["param"] == "stop"
    assert HTTP.post(worker.url + "/tokenize", json={"prompt": "hi"}).status_code == 400
    answer = _complete(worker, {"prompt": [1], "seed": 1, "max_tokens": 2, "return_token_ids": True})
    assert answer.json()["choices"][0]["token_ids"] == [FIRST_NODE, FIRST_NODE + 1]
    assert answer.json()["choices"][0]["text"] == ""


def test_a_worker_ends_with_its_engine_process(fleet: Fleet, checkpoint: Path) -> None:
    worker = _ready(fleet.worker("decode", checkpoint))
    events = _complete(worker, _body(Script.DIE_AFTER_TWO, stream=True)).text.split("\n\n")
    assert "error" in json.loads(events[-2].removeprefix("data: "))
    assert worker.process.wait(timeout=60) == 1


def test_an_engine_that_cannot_start_ends_the_worker_with_its_exit_code(
    fleet: Fleet, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "fatal").symlink_to(checkpoint)
    worker = fleet.worker("decode", tmp_path / "fatal")
    assert worker.process.wait(timeout=60) == 6


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_a_worker_and_its_running_jobs(
    fleet: Fleet, checkpoint: Path, number: signal.Signals, code: int
) -> None:
    worker = _ready(fleet.worker("decode", checkpoint))
    with HTTP.stream(
        "POST", worker.url + "/v1/completions", json=_body(Script.HANG_AFTER_TWO, stream=True), headers=_headers()
    ) as answer:
        lines = answer.iter_lines()
        next(lines)
        worker.process.send_signal(number)
        wait_until(lambda: HTTP.get(worker.admin + "/readyz").status_code == 503)
        worker.process.send_signal(number)
        assert any('"shutdown"' in line for line in lines)
    assert worker.process.wait(timeout=60) == code


def test_the_engine_process_dies_with_a_killed_front(fleet: Fleet, checkpoint: Path) -> None:
    worker = _ready(fleet.worker("decode", checkpoint))
    children = Path(f"/proc/{worker.process.pid}/task/{worker.process.pid}/children").read_text().split()
    assert len(children) == 1
    worker.process.kill()
    wait_until(lambda: not Path(f"/proc/{children[0]}").exists() or "State:\tZ" in _proc_status(children[0]))


def _proc_status(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return "State:\tZ"
