"""``pdkv up``, ``demo`` and ``generate``, what takes longest: hung and dead workers, several of each, whole runs."""

import os
import signal
import subprocess
import sys
from pathlib import Path

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import END_S, ask, descendants, running, token_ids, wait_until
from tests.e2e.test_up import alive, pid_of, start, wait_until_it_says_ready
from tests.http import HTTP


def test_a_child_that_hangs_is_killed_in_time(link_chasing_model: Path, tmp_path: Path) -> None:
    process = start(link_chasing_model, tmp_path)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        os.kill(pid_of(process, "prefill"), signal.SIGSTOP)
        process.popen.terminate()
        process.popen.wait(END_S)
        wait_until(lambda: not alive(below), "no orphan")


def test_a_dead_worker_is_started_anew_and_serves(link_chasing_model: Path, tmp_path: Path) -> None:
    process = start(link_chasing_model, tmp_path)
    prompt = make_prompt(1, 300)
    with running(process):
        wait_until_it_says_ready(process)
        for role in ("prefill", "decode"):
            os.kill(pid_of(process, role), signal.SIGKILL)
            wait_until(lambda: process.health() == 503, "the router notices")
            wait_until(lambda: process.health() == 200, "the worker is back", 60)
            assert token_ids(ask(process.url, prompt.token_ids, 8)) == list(prompt.expected(8))
        assert "starting it anew" in process.log.read_text()


def test_two_of_each_take_turns_and_the_dead_stay_dead_without_restarts(
    link_chasing_model: Path, tmp_path: Path
) -> None:
    process = start(link_chasing_model, tmp_path, "--prefill", "2", "--decode", "2", "--no-restart")
    prompt = make_prompt(2, 300)
    with running(process):
        wait_until_it_says_ready(process)
        wait_until(lambda: HTTP.get(f"{process.url}/health").text.count('"ready":true') == 4, "all four are ready")
        answers = [ask(process.url, prompt.token_ids, 8) for _ in range(4)]
        assert [token_ids(answer) for answer in answers] == [list(prompt.expected(8))] * 4
        assert len({answer.json()["pdkv"]["prefill_control"] for answer in answers}) == 2
        os.kill(pid_of(process, "decode"), signal.SIGKILL)
        wait_until(lambda: "restarts are switched off" in process.log.read_text(), "it says so")
        assert [token_ids(ask(process.url, prompt.token_ids, 8)) for _ in range(4)] == [list(prompt.expected(8))] * 4


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
