"""Real processes for the daemons' tests: fronts above scripted engines, and routers."""

import contextlib
import json
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pdkv.__main__ import main
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from tests.daemons import scripted_worker
from tests.forked import Forked
from tests.forkserver import FORKED
from tests.http import HTTP

DEADLINE_S = 60


class Daemon:
    """One process that logs JSON to stderr, and the address it logged."""

    def __init__(self, main: Callable[[], int | None], *args: str, env: dict[str, str] | None = None) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("PDKV_")}
        self._stderr, theirs = FORKED.Pipe(duplex=False)
        with theirs:
            self.process = Forked(main, args, {**clean, **(env or {})}, theirs)
        self.url = ""
        self.admin = ""
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reading = threading.Thread(target=self._read, daemon=True)
        self._reading.start()

    def wait_for_event(self, event: str) -> dict[str, object]:
        seen = []
        while line := self._lines.get():
            seen.append(line)
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                if record.get("event") == event:
                    return record
        raise AssertionError(f"the process ended before it logged {event!r}: {''.join(seen)}")

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        self.process.wait()
        self._reading.join(DEADLINE_S)
        self._stderr.close()

    def _read(self) -> None:
        """All of the log, lest the process wait for room in the pipe; an empty line is its end."""
        with open(self._stderr.fileno(), closefd=False) as lines:
            for line in lines:
                self._lines.put(line)
        self._lines.put("")


class Fleet:
    """Starts workers and routers, and ends them all."""

    def __init__(self) -> None:
        self._daemons: list[Daemon] = []

    def worker(self, role: str, model: Path, port: int = 0, *, ready: bool = False, **settings: object) -> Daemon:
        listen = f"127.0.0.1:{port}"
        daemon = self._start(scripted_worker.main, role, str(model), listen, json.dumps(settings))
        started = daemon.wait_for_event("loading")
        daemon.url, daemon.admin = f"http://{started['listen']}", f"http://{started['admin']}"
        if ready:
            wait_until(lambda: HTTP.get(daemon.url + "/pdkv/v1/info").json()["ready"])
        return daemon

    def router(self, prefill: list[Daemon], decode: list[Daemon], *flags: str, ready: bool = True) -> Daemon:
        targets = [f"--prefill={p.url}" for p in prefill] + [f"--decode={d.url}" for d in decode]
        daemon = self._start(
            main,
            "router",
            "--listen=127.0.0.1:0",
            "--admin-listen=127.0.0.1:0",
            "--poll-interval=0.2",
            *targets,
            *flags,
        )
        started = daemon.wait_for_event("listening")
        daemon.url, daemon.admin = str(started["url"]), f"http://{started['admin']}"
        if ready:
            wait_until(lambda: HTTP.get(daemon.url + "/health").status_code == 200)
        return daemon

    def _start(self, main: Callable[[], int | None], *args: str) -> Daemon:
        daemon = Daemon(main, *args)
        self._daemons.append(daemon)
        return daemon

    def close(self) -> None:
        for daemon in self._daemons:
            daemon.kill()


def wait_until(condition) -> None:
    """Poll until the condition holds; a condition that never does fails the test."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never became true"
        time.sleep(0.02)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "link-chasing"
    write_checkpoint(folder)
    return folder


@pytest.fixture(scope="session")
def bare_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without a tokenizer."""
    folder = tmp_path_factory.mktemp("model") / "bare"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).symlink_to(checkpoint / name)
    return folder


@pytest.fixture
def fleet() -> Iterator[Fleet]:
    fleet = Fleet()
    yield fleet
    fleet.close()


@pytest.fixture(scope="module")
def shared_fleet() -> Iterator[Fleet]:
    """For tests that leave their workers as they found them."""
    fleet = Fleet()
    yield fleet
    fleet.close()
