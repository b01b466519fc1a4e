"""Processes that die, stall or are left alone: a right answer or an honest error in time, and every page comes back.

One deployment with short leases serves all tests; each starts again what it killed.
"""

import contextlib
import json
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from tests.e2e.deployment import NEVER_EARLY, Process, Trio, descendants, token_ids, trio, wait_ready, wait_until
from tests.http import HTTP

LEASE_S = 4.0
DEADLINE_S = 40.0
LONG = 2200
NUM_TOKENS = 24

Answer = Future[httpx.Response]


@pytest.fixture(scope="module")
def fleet(link_chasing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    flags = ("--max-model-len", "8192", "--num-pages", "200", "--lease-ttl", str(LEASE_S))
    router_flags = ("--request-timeout", str(DEADLINE_S), "--poll-interval", "0.2")
    folder = tmp_path_factory.mktemp("failures")
    own = {"prefill_flags": NEVER_EARLY, "router_flags": router_flags}
    with trio(link_chasing_model, folder, *flags, **own) as processes:
        yield processes


@pytest.fixture
def healthy(fleet: Trio) -> Trio:
    """The deployment, ready and idle, with whatever a test that failed has left dead started anew."""
    for process in (fleet.prefill, fleet.decode, fleet.router):
        assert process.popen is not None
        if process.popen.poll() is not None:
            start_again(process)
    wait_until(lambda: fleet.router.health() == 200, "the deployment is ready")
    assert_idle(fleet)
    return fleet


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


# ---- requests


def body(prompt: LinkChasingPrompt, num_tokens: int, **fields: object) -> dict[str, object]:
    return {
        "model": "link-chasing",
        "prompt": list(prompt.token_ids),
        "max_tokens": num_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }


def ask(deployment: Trio, prompt: LinkChasingPrompt, num_tokens: int = NUM_TOKENS) -> httpx.Response:
    """The answer, whatever it is, if one comes soon after the request's deadline."""
    url = f"{deployment.router.url}/v1/completions"
    return HTTP.post(url, json=body(prompt, num_tokens), timeout=DEADLINE_S + 10)


@contextlib.contextmanager
def stream(deployment: Trio, prompt: LinkChasingPrompt, num_tokens: int) -> Iterator[Iterator[str]]:
    """The data of each event. Leaving the block closes the connection."""
    url = f"{deployment.router.url}/v1/completions"
    asked = body(prompt, num_tokens, stream=True)
    with HTTP.stream("POST", url, json=asked, timeout=DEADLINE_S + 10) as response:
        assert response.status_code == 200
        yield (line.removeprefix("data: ") for line in response.iter_lines() if line)


@contextlib.contextmanager
def impatient(deployment: Trio, asked: dict[str, object]) -> Iterator[socket.socket]:
    """A client whose request is under way. Leaving the block breaks the connection off."""
    host, port = deployment.router.url.removeprefix("http://").split(":")
    content = json.dumps(asked).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=DEADLINE_S) as connection:
        connection.sendall(head.encode() + content)
        yield connection


def assert_honest(response: httpx.Response, prompt: LinkChasingPrompt) -> None:
    """The whole right answer, or an error of the server's in OpenAI's form."""
    if response.status_code == 200:
        assert token_ids(response) == list(prompt.expected(NUM_TOKENS))
        return
    assert 500 <= response.status_code < 600, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    assert error["code"] != "internal", error


# ---- what is looked at


def pid(process: Process) -> int:
    assert process.popen is not None
    assert process.popen.poll() is None, process.tail()
    return process.popen.pid


def engine_pid(process: Process) -> int:
    (engine,) = descendants(pid(process))
    return engine


def assert_idle(deployment: Trio) -> None:
    for side in (deployment.prefill, deployment.decode):
        wait_until(side.holds_nothing, f"{side.role} holds no page and no transfer")


def assert_serves(deployment: Trio, seed: int) -> None:
    """As it should, and is idle after it."""
    wait_until(lambda: deployment.router.health() == 200, "the deployment is ready")
    prompt = make_prompt(seed, 700)
    assert token_ids(ask(deployment, prompt)) == list(prompt.expected(NUM_TOKENS))
    assert_idle(deployment)


def is_moving(deployment: Trio) -> bool:
    """A transfer is under way, and holds pages of both workers."""
    return bool(deployment.decode.status()["transfers_open"]) and bool(deployment.prefill.status()["leases_active"])


def wait_for_transfer(deployment: Trio, answer: Answer) -> None:
    wait_until(lambda: is_moving(deployment) or answer.done(), "a transfer is under way")
    assert not answer.done(), answer.result().text


def let_pass(seconds: float, answers: Sequence[Answer]) -> None:
    """Time, less if everything is over before."""
    for answer in answers:
        with contextlib.suppress(TimeoutError):
            answer.exception(seconds)
            continue
        return


# ---- what is done to processes


def kill_worker(process: Process) -> None:
    """The front; the kernel takes the engine process with it."""
    process.kill()


def kill_engine(process: Process) -> None:
    """The engine process; the front sees it and ends."""
    os.kill(engine_pid(process), signal.SIGKILL)


def start_again(process: Process) -> None:
    """A new life on the same port."""
    assert process.popen is not None
    process.popen.wait(DEADLINE_S)
    process.start()
    wait_ready(process)


@contextlib.contextmanager
def stopped(*pids: int) -> Iterator[None]:
    for number in pids:
        os.kill(number, signal.SIGSTOP)
    try:
        yield
    finally:
        for number in pids:
            os.kill(number, signal.SIGCONT)


KILLS = (kill_worker, kill_engine)


@pytest.mark.parametrize("kill", KILLS)
def test_prefill_killed_after_a_transfer(healthy: Trio, kill: Callable[[Process], None]) -> None:
    """D has all that it needs, and answers to the end; the next request meets an idle P that is dead."""
    others = pid(healthy.decode), pid(healthy.router)
    prompt = make_prompt(40, 1000)
    tokens: list[int] = []
    killed = False
    with stream(healthy, prompt, 60) as events:
        for event in events:
            if event == "[DONE]":
                break
            tokens += json.loads(event)["choices"][0]["token_ids"]
            if not killed and len(tokens) > 1:  # the first is prefill's; the second, D has computed over all of it
                kill(healthy.prefill)
                killed = True
        else:
            raise AssertionError("the stream ended without [DONE]")
    assert tokens == list(prompt.expected(60))
    assert_honest(ask(healthy, prompt), prompt)
    wait_until(healthy.decode.holds_nothing, "decode's pages are back")
    start_again(healthy.prefill)
    assert_serves(healthy, 41)
    assert others == (pid(healthy.decode), pid(healthy.router))


@pytest.mark.parametrize("seed", range(3))
def test_prefill_killed_during_a_transfer(healthy: Trio, pool: ThreadPoolExecutor, seed: int) -> None:
    """One prompt is being read, another waits behind it. Seed 0 kills at once, others some time later."""
    others = pid(healthy.decode), pid(healthy.router)
    prompts = [make_prompt(10 * seed + i, LONG) for i in range(2)]
    answers = [pool.submit(ask, healthy, prompt) for prompt in prompts]
    wait_for_transfer(healthy, answers[0])
    if seed:
        let_pass(random.Random(seed).uniform(0, 3), answers)
    KILLS[seed % 2](healthy.prefill)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert_honest(answer.result(), prompt)
    wait_until(healthy.decode.holds_nothing, "decode's pages are back")
    start_again(healthy.prefill)
    assert_serves(healthy, seed)
    assert others == (pid(healthy.decode), pid(healthy.router))


def test_decode_killed_during_a_transfer(healthy: Trio, pool: ThreadPoolExecutor) -> None:
    """P stops computing and has its pages back as soon as the router or the lease tells it."""
    prompt = make_prompt(50, LONG)
    answer = pool.submit(ask, healthy, prompt)
    wait_for_transfer(healthy, answer)
    prefill = pid(healthy.prefill)
    kill_worker(healthy.decode)
    wait_until(healthy.prefill.holds_nothing, "prefill's pages are back")
    assert_honest(answer.result(), prompt)
    start_again(healthy.decode)
    assert_serves(healthy, 51)
    assert prefill == pid(healthy.prefill)


def test_router_killed_during_a_transfer(healthy: Trio) -> None:
    with impatient(healthy, body(make_prompt(52, LONG), NUM_TOKENS)) as client:
        wait_until(lambda: is_moving(healthy), "a transfer is under way")
        kill_worker(healthy.router)
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(64) == b""
    assert_idle(healthy)
    start_again(healthy.router)
    assert_serves(healthy, 53)


@pytest.mark.parametrize("streaming", [True, False])
def test_a_client_that_leaves_during_prefill(healthy: Trio, streaming: bool) -> None:
    with impatient(healthy, body(make_prompt(65 + streaming, LONG), NUM_TOKENS, stream=streaming)):
        wait_until(lambda: is_moving(healthy), "a transfer is under way")
    assert_idle(healthy)
    assert_serves(healthy, 61)


def test_clients_that_leave_during_decode(healthy: Trio) -> None:
    """One that streams, one that does not."""
    endless = 7000
    with (
        impatient(healthy, body(make_prompt(62, 700), endless, stream=True)) as reader,
        impatient(healthy, body(make_prompt(63, 700), endless)),
    ):
        assert reader.recv(64).startswith(b"HTTP/1.1 200")
        wait_until(lambda: healthy.decode.status()["requests_running"] == 2, "both decode")
    assert_idle(healthy)
    assert_serves(healthy, 64)


@pytest.mark.parametrize(("role", "front_too"), [("prefill", True), ("prefill", False), ("decode", False)])
def test_a_worker_stopped_for_longer_than_the_lease(
    healthy: Trio, pool: ThreadPoolExecutor, role: str, front_too: bool
) -> None:
    """Its lease runs out in its sleep: it must not go on as if nothing had been."""
    prompt = make_prompt(70 + 2 * front_too + (role == "decode"), LONG)  # one that P has not in its cache
    sleeper, other = (healthy.prefill, healthy.decode) if role == "prefill" else (healthy.decode, healthy.prefill)
    answer = pool.submit(ask, healthy, prompt)
    wait_for_transfer(healthy, answer)
    with stopped(*([pid(sleeper)] if front_too else []), engine_pid(sleeper)):
        wait_until(lambda: answer.done() or other.holds_nothing(), "the lease has ended")
    assert_honest(answer.result(), prompt)
    assert_serves(healthy, 79)
