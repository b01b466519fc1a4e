"""``pdkv up`` as a whole: it ends when told to, leaves no orphan however it ends, and starts the dead anew."""

import os
import re
import signal
import socket
import threading
from concurrent.futures import Future
from pathlib import Path

import httpx
import pytest

from pdkv.daemons.control_keys import new_keys, show_keys
from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from tests.e2e.deployment import END_S, Process, ask, descendants, running, token_ids, up, wait_until
from tests.http import HTTP


def alive(pids: set[int]) -> set[int]:
    def runs(pid: int) -> bool:
        try:
            return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return False

    return {pid for pid in pids if runs(pid)}


def pid_of(process: Process, role: str) -> int:
    """The front or router of this role below a ``pdkv up``."""
    assert process.popen is not None
    for pid in descendants(process.popen.pid):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"pdkv", role.encode()]:
            return pid
    raise AssertionError(f"no {role} below {process.popen.pid}")


def wait_until_it_says_ready(process: Process) -> None:
    """A child that dies before that is no reason to start it anew."""
    wait_until(lambda: "ready: http" in process.log.read_text(), "it says that it is ready")


def start(model: Path, folder: Path, *flags: str) -> Process:
    return up(model, folder, "--max-model-len", "1024", "--max-batch", "2", *flags)


def _asking(process: Process, prompt: LinkChasingPrompt, num_tokens: int) -> "Future[httpx.Response]":
    """A request under way, in a thread of its own."""
    answer: Future[httpx.Response] = Future()

    def run() -> None:
        try:
            answer.set_result(ask(process.url, prompt.token_ids, num_tokens, timeout_s=60))
        except httpx.HTTPError as exc:
            answer.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return answer


def _in_flight(process: Process) -> bool:
    admin = re.search(r"^  decode-0 +(http://\S+)/metrics", process.log.read_text(), re.MULTILINE)
    assert admin is not None, "the admin ports are printed at ready"
    return 'pdkv_requests_in_flight{role="decode"} 1.0' in HTTP.get(f"{admin[1]}/metrics").text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_all_of_it(link_chasing_model: Path, tmp_path: Path, number: signal.Signals, code: int) -> None:
    """Idle at SIGINT, with keys for clients; at SIGTERM a request runs, and is answered, between workers with keys."""
    keys = ("--control-keys", str(tmp_path / "keys")) if number == signal.SIGTERM else ()
    if keys:
        new_keys(tmp_path / "keys")
    (tmp_path / "clients").write_text("sk-client-0123456789\n")
    api_keys = () if keys else ("--api-keys", str(tmp_path / "clients"))
    process = start(link_chasing_model, tmp_path, "--drain-timeout", "10", *keys, *api_keys)
    prompt = make_prompt(4, 300)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        assert len(alive(below)) >= 5  # two fronts, two engine processes, a router
        wait_until(lambda: f"curl {process.url}/v1/completions" in process.log.read_text(), "a curl line")
        channel = f"encrypted, key {show_keys(tmp_path / 'keys').fingerprint}" if keys else "not encrypted"
        wait_until(lambda: f"control channel: {channel}\n" in process.log.read_text(), "what the channel is")
        if api_keys:
            models = f"{process.url}/v1/models"
            assert HTTP.get(models).status_code == 401
            assert HTTP.get(models, headers={"Authorization": "Bearer sk-client-0123456789"}).status_code == 200
        answer = _asking(process, prompt, 40) if number == signal.SIGTERM else None
        if answer is not None:
            wait_until(lambda: _in_flight(process) or answer.done(), "the request is under way")
        process.popen.send_signal(number)
        assert process.popen.wait(END_S) == code
        assert alive(below) == set()
        assert "Traceback" not in process.tail()
        if answer is not None:
            assert token_ids(answer.result()) == list(prompt.expected(40))


def test_a_second_signal_kills_at_once(link_chasing_model: Path, tmp_path: Path) -> None:
    process = start(link_chasing_model, tmp_path, "--drain-timeout", "10")
    with running(process):
        assert process.popen is not None
        wait_until_it_says_ready(process)
        below = descendants(process.popen.pid)
        router = pid_of(process, "router")
        os.kill(router, signal.SIGSTOP)  # it will not end by itself
        process.popen.send_signal(signal.SIGINT)
        wait_until(lambda: "a second signal kills" in process.log.read_text(), "it ends")
        process.popen.send_signal(signal.SIGINT)
        assert process.popen.wait(END_S) == 130
        assert alive(below) == set()
        assert "killing it" in process.log.read_text()


def test_a_killed_up_takes_everything_with_it(link_chasing_model: Path, tmp_path: Path) -> None:
    process = start(link_chasing_model, tmp_path)
    with running(process):
        assert process.popen is not None
        below = descendants(process.popen.pid)
        process.kill()
        wait_until(lambda: not alive(below), "no orphan")


def test_a_start_that_fails_says_why_and_ends(link_chasing_model: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as ours:
        taken = up(link_chasing_model, tmp_path, "--port", str(ours.getsockname()[1]))
        broken = up(tmp_path, tmp_path)
        for process, message in ((taken, "cannot listen on"), (broken, "config.json")):
            process.start()
            assert process.popen is not None
            assert process.popen.wait(END_S) == 2
            assert message in process.tail()
