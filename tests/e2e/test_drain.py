"""Draining of real daemons: answers go on to their end, leased pages stay until they are pulled or expire."""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from tests.e2e.deployment import (
    END_S,
    LONG,
    Process,
    Trio,
    ask,
    stopped_amid_transfer,
    token_ids,
    trio,
    wait_ready,
    wait_until,
)
from tests.forked import Forked
from tests.http import HTTP

LEASE_S = 10.0
NUM_TOKENS = 8


@pytest.fixture(scope="module")
def fleet(link_chasing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    flags = ("--max-model-len", "8192", "--num-pages", "200", "--lease-ttl", str(LEASE_S))
    router_flags = ("--request-timeout", "120", "--drain-timeout", "120", "--poll-interval", "0.2")
    with trio(link_chasing_model, tmp_path_factory.mktemp("drain"), *flags, router_flags=router_flags) as processes:
        yield processes


@pytest.fixture
def healthy(fleet: Trio) -> Trio:
    """The deployment, with whatever the last test ended started anew."""
    for process in (fleet.prefill, fleet.decode, fleet.router):
        assert process.popen is not None
        if process.popen.poll() is not None:
            process.start()
            wait_ready(process)
    wait_until(lambda: fleet.router.health() == 200, "the deployment is ready")
    wait_until(lambda: fleet.prefill.holds_nothing() and fleet.decode.holds_nothing(), "it is idle")
    return fleet


def prompts(seed: int) -> Iterator[LinkChasingPrompt]:
    return (make_prompt(seed + 10_000 * again, LONG) for again in range(10))


def terminate(process: Process) -> "subprocess.Popen[bytes] | Forked":
    assert process.popen is not None
    process.popen.terminate()
    return process.popen


def is_draining(process: Process) -> bool:
    """It says so on its admin port, and is live all the same."""
    ready = HTTP.get(f"{process.admin_url}/readyz", timeout=5)
    assert HTTP.get(f"{process.admin_url}/livez", timeout=5).status_code == 200
    failed = {condition["name"] for condition in ready.json()["conditions"] if not condition["ok"]}
    return ready.status_code == 503 and "not_draining" in failed


def refusal(url: str) -> httpx.Response:
    return HTTP.post(f"{url}/v1/completions", json={"prompt": [1, 2], "max_tokens": 1}, timeout=60)


def test_logs_tell_every_change_of_state_of_a_transfer(healthy: Trio) -> None:
    prompt = make_prompt(1003, 300)
    answer = ask(healthy.router.url, prompt.token_ids, NUM_TOKENS)
    request_id = answer.headers["x-request-id"]
    wait_until(lambda: healthy.prefill.holds_nothing() and healthy.decode.holds_nothing(), "both are idle")

    def lines(process: Process, key: str, value: object) -> list[dict[str, object]]:
        records = [json.loads(line) for line in process.log.read_text().splitlines() if line.startswith("{")]
        return [record for record in records if record.get(key) == value]

    (asking,) = [line for line in lines(healthy.router, "request_id", request_id) if line["event"] == "asking"]
    transfer = asking["transfer"]
    for process in (healthy.prefill, healthy.decode):
        assert transfer in [line.get("transfer") for line in lines(process, "request_id", request_id)]
    events = [line["event"] for line in lines(healthy.prefill, "transfer", transfer)]
    states = [str(event).removeprefix("transfer ") for event in events if str(event).startswith("transfer ")]
    assert sorted(states) == sorted(["requested", "acquired", "pages reserved", "finished", "released", "pages free"])
    events = [line["event"] for line in lines(healthy.decode, "transfer", transfer)]
    states = [str(event).removeprefix("transfer ") for event in events if str(event).startswith("transfer ")]
    assert states == ["requested", "pages reserved", "arrived", "finished"]


@pytest.mark.parametrize("role", ["decode", "router"])
def test_a_stream_goes_on_to_its_end(healthy: Trio, role: str) -> None:
    process = healthy.decode if role == "decode" else healthy.router
    prompt = make_prompt(1000, 700)
    asked = {
        "prompt": list(prompt.token_ids),
        "max_tokens": 120,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "stream": True,
    }
    tokens: list[int] = []
    with HTTP.stream("POST", f"{healthy.router.url}/v1/completions", json=asked, timeout=120) as answer:
        for line in answer.iter_lines():
            if line == "data: [DONE]":
                break
            if line and not tokens:
                popen = terminate(process)
                wait_until(lambda: is_draining(process), "it drains")
                refused = refusal(healthy.router.url)
                assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
                assert popen.poll() is None
            if line:
                tokens += json.loads(line.removeprefix("data: "))["choices"][0]["token_ids"]
        else:
            raise AssertionError("the stream ended without [DONE]")
    assert tokens == list(prompt.expected(120))
    assert popen.wait(END_S) == 143


def test_prefill_keeps_its_pages_until_they_are_pulled(healthy: Trio) -> None:
    with stopped_amid_transfer(healthy, prompts(1001), NUM_TOKENS) as (prompt, answer):
        popen = terminate(healthy.prefill)  # it drains, whenever it comes to that
    assert token_ids(answer.result()) == list(prompt.expected(NUM_TOKENS))
    assert popen.wait(END_S) == 143
    assert '"transfer released"' in healthy.prefill.log.read_text()


def test_prefill_keeps_its_pages_until_the_lease_expires(healthy: Trio) -> None:
    with stopped_amid_transfer(healthy, prompts(1002), NUM_TOKENS) as (_, answer):
        popen = terminate(healthy.prefill)
        wait_until(lambda: is_draining(healthy.prefill), "it drains")
        assert popen.wait(END_S) == 143
    assert '"lease_expired"' in healthy.prefill.log.read_text()
    assert answer.result().status_code >= 500
    wait_until(healthy.decode.holds_nothing, "decode's pages are back")
