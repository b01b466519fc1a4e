"""``pdkv up`` as a whole: it ends when told to, leaves no orphan however it ends, and starts the dead anew."""

import os
import re
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest

from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from tests.e2e.deployment import END_S, Process, ask, descendants, running, token_ids, up, wait_until
from tests.http import HTTP


def _alive(pids: set[int]) -> set[int]:
    def runs(pid: int) -> bool:
        try:
            return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    return {pid for pid in pids if runs(pid)}


def _pid_of(process: Process, role: str) -> int:
    """The front or router of this role below a ``pdkv up``."""
    assert process.popen is not None
    for pid in descendants(process.popen.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"pdkv", role.encode()]:
            return pid
    raise AssertionError(f"no {role} below {process.popen.pid}")


def _wait_until_it_says_ready(process: Process) -> None:
    """A child that dies before that is no reason to start it anew."""
    wait_until(lambda: "ready: http" in process.log.read_text(), "it says that it is ready")


def _start(model: Path, folder: Path, *flags: str) -> Process:
    return up(model, folder, "--max-model-len", "1024", "--max-batch", "2", *flags)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_of_it(link_chasing_model: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    process = _start(link_chasing_model, tmp_path)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        assert len(_alive(below)) >= 5  # two fronts, two engine processes, a router
        wait_until(lambda: f"curl {process.url}/v1/completions" in process.log.read_text(), "a curl line")
        process.popen.send_signal(number)
        assert process.popen.wait(END_S) == code
        assert _alive(below) == set()
        assert "Traceback" not in process.tail()


def _asking(process: Process, prompt: LinkChasingPrompt, num_tokens: int) -> "Future[httpx.Response]":
    """A request under way, in a thread of its own."""
    answer: Future[httpx.Response] = Future()
    threading.Thread(
        target=lambda: answer.set_result(ask(process.url, prompt.token_ids, num_tokens, timeout_s=60)), daemon=True
    ).start()
    return answer


def _in_flight(process: Process) -> bool:
    admin = re.search(r"^  decode-0 +(http://\S+)/metrics", process.log.read_text(), re.MULTILINE)
    assert admin is not None, "the admin ports are printed at ready"
    return 'pdkv_requests_in_flight{role="decode"} 1.0' in HTTP.get(f"{admin[1]}/metrics").text


def test_what_runs_at_the_end_is_answered(link_chasing_model: Path, tmp_path: Path) -> None:
    process = _start(link_chasing_model, tmp_path)
    prompt = make_prompt(4, 300)
    with running(process):
        assert process.popen is not None
        _wait_until_it_says_ready(process)
        answer = _asking(process, prompt, 150)
        wait_until(lambda: _in_flight(process), "the request is under way")
        process.popen.terminate()
        assert process.popen.wait(END_S) == 143
        assert token_ids(answer.result()) == list(prompt.expected(150))


def test_a_second_signal_kills_at_once(link_chasing_model: Path, tmp_path: Path) -> None:
    process = _start(link_chasing_model, tmp_path, "--drain-timeout", "10")
    with running(process):
        assert process.popen is not None
        _wait_until_it_says_ready(process)
        below = descendants(process.popen.pid)
        router = _pid_of(process, "router")
        os.kill(router, signal.SIGSTOP)  # it will not end by itself
        process.popen.send_signal(signal.SIGINT)
        wait_until(lambda: "a second signal kills" in process.log.read_text(), "it ends")
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(END_S) == 130
        assert _alive(below) == set()
        assert "killing it" in process.log.read_text()


def test_a_child_that_hangs_is_killed_in_time(link_chasing_model: Path, tmp_path: Path) -> None:
    process = _start(link_chasing_model, tmp_path)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        os.kill(_pid_of(process, "prefill"), signal.SIGSTOP)
        process.popen.terminate()
        process.popen.wait(END_S)
        wait_until(lambda: not _alive(below), "no orphan")


def test_a_killed_up_takes_everything_with_it(link_chasing_model: Path, tmp_path: Path) -> None:
    process = _start(link_chasing_model, tmp_path)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        process.kill()
        wait_until(lambda: not _alive(below), "no orphan")


def test_a_dead_worker_is_started_anew_and_serves(link_chasing_model: Path, tmp_path: Path) -> None:
    process = _start(link_chasing_model, tmp_path)
    prompt = make_prompt(1, 300)
    with running(process):
        _wait_until_it_says_ready(process)
        for role in ("prefill", "decode"):
            os.kill(_pid_of(process, role), signal.SIGKILL)
            wait_until(lambda: process.health() == 503, "the router notices")
            wait_until(lambda: process.health() == 200, "the worker is back", 60)
            assert token_ids(ask(process.url, prompt.token_ids, 8)) == list(prompt.expected(8))
        assert "starting it anew" in process.log.read_text()


def test_two_of_each_take_turns_and_the_dead_stay_dead_without_restarts(
    link_chasing_model: Path, tmp_path: Path
) -> None:
    process = _start(link_chasing_model, tmp_path, "--prefill", "2", "--decode", "2", "--no-restart")
    prompt = make_prompt(2, 300)
    with running(process):
        _wait_until_it_says_ready(process)
        wait_until(lambda: HTTP.get(f"{process.url}/health").text.count('"ready":true') == 4, "all four are ready")
        answers = [ask(process.url, prompt.token_ids, 8) for _ in range(4)]
        assert [token_ids(answer) for answer in answers] == [list(prompt.expected(8))] * 4
        assert len({answer.json()["pdkv"]["prefill_control"] for answer in answers}) == 2
        os.kill(_pid_of(process, "decode"), signal.SIGKILL)
        wait_until(lambda: "restarts are switched off" in process.log.read_text(), "it says so")
        assert [token_ids(ask(process.url, prompt.token_ids, 8)) for _ in range(4)] == [list(prompt.expected(8))] * 4


def test_a_start_that_fails_says_why_and_ends(deployment: Process, link_chasing_model: Path, tmp_path: Path) -> None:
    taken = up(link_chasing_model, tmp_path, "--port", deployment.url.rpartition(":")[2])
    broken = up(tmp_path, tmp_path)
    for process, message in ((taken, "cannot listen on"), (broken, "config.json")):
        process.start()
        assert process.popen is not None
        assert process.popen.wait(END_S) == 2
        assert message in process.tail()


def test_demo_proves_itself(tmp_path: Path) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "pdkv", "demo", "--tokens", "2500"],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    for word in (
        "2,500 tokens",
        "chain expected",
        "prefill -> decode",
        "undivided",
        "index_k",
        "spans",
        "GB/s",
        "path",
    ):
        assert word in ended.stdout


def test_generate_answers_through_a_deployment_of_its_own_over_fp8(link_chasing_model: Path) -> None:
    prompt = make_prompt(3, 200)
    stored = ("--kv-dtype", "fp8", "--index-dtype", "fp8")
    ended = subprocess.run(
        [
            sys.executable,
            "-m",
            "pdkv",
            "generate",
            "--model",
            str(link_chasing_model),
            "--prompt",
            prompt.text,
            *stored,
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, "PDKV_MAX_BATCH": "2"},
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split() == [f"n{token - 64}" for token in prompt.expected(16)]
