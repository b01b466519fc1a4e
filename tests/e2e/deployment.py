"""Real deployments for tests: ``pdkv`` processes on free ports, asked over HTTP, ended by pid."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families

from pdkv.__main__ import main
from pdkv.daemons.lease_desk import LEASES_PATH, Leases
from pdkv.daemons.link import LeaseStatus
from pdkv.verify.link_chasing import LinkChasingPrompt
from tests.forked import Forked
from tests.http import HTTP
from tests.ports import free_port

START_S = 120.0
END_S = 60.0
LONG = 3400
"""Tokens of 27 pages: six chunks of 512, and one of three pages, which is read in layer groups."""


def descendants(pid: int) -> set[int]:
    """All processes below ``pid``."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found |= {child} | descendants(child)
    return found


def wait_until(condition: object, what: str, timeout_s: float = 60.0) -> None:
    """Poll ``condition()`` until it is true; fail, saying ``what``, when it does not become so in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, f"not within {timeout_s} s: {what}"
        time.sleep(0.02)


@dataclass
class Process:
    """One ``pdkv ROLE`` process and all below it. ``url`` is its HTTP address; what it logs goes to ``log``."""

    role: str
    url: str
    arguments: list[str]
    log: Path
    environment: dict[str, str] = field(default_factory=dict)
    prefix: tuple[str, ...] = ()
    """In front of the command, for example ("ip", "netns", "exec", NAME)."""
    admin_url: str = ""
    popen: "subprocess.Popen[bytes] | Forked | None" = None

    def start(self) -> None:
        """Workers and routers by forks; ``up`` in full, and all below it."""
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE", **self.environment}
        if self.role in ("prefill", "decode", "router") and not self.prefix:
            self.popen = Forked(main, (self.role, *self.arguments), environment, self.log)
            return
        command = [*self.prefix, sys.executable, "-m", "pdkv", self.role, *self.arguments]
        with self.log.open("ab") as out:
            self.popen = subprocess.Popen(command, stdout=out, stderr=out, env=environment)

    def health(self) -> int:
        """The status of ``GET /health``; 0 when nobody answers."""
        try:
            return HTTP.get(f"{self.url}/health", timeout=5).status_code
        except httpx.HTTPError:
            return 0

    def status(self) -> dict[str, object]:
        """Pages, requests, leases and peers of a worker."""
        return dict(self._engine_says(f"{self.url}/pdkv/v1/status").json())

    def leases(self) -> list[LeaseStatus]:
        """Those of a prefill worker that are active, the oldest first."""
        return msgspec.json.decode(self._engine_says(self.admin_url + LEASES_PATH).content, type=Leases).leases

    @staticmethod
    def _engine_says(url: str) -> httpx.Response:
        """Where a step keeps the engine from answering, it is asked once more."""
        until = time.monotonic() + 60
        while (answer := HTTP.get(url, timeout=10)).status_code == 503:
            if time.monotonic() > until:
                break
            time.sleep(0.1)
        answer.raise_for_status()
        return answer

    def info(self) -> dict[str, object]:
        return dict(HTTP.get(f"{self.url}/pdkv/v1/info", timeout=10).json())

    def metrics(self) -> dict[str, float]:
        """Every sample of ``/metrics``, by name and labels as they are written, without the role."""
        answer = HTTP.get(f"{self.admin_url}/metrics", timeout=10)
        answer.raise_for_status()
        return {
            _written(sample.name, sample.labels): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def holds_nothing(self) -> bool:
        status = self.status()
        return status["pages_free"] == status["pages_usable"] and status["transfers_open"] == 0

    def kill(self, signum: int = signal.SIGKILL) -> None:
        assert self.popen is not None
        self.popen.send_signal(signum)
        if signum == signal.SIGKILL:
            self.popen.wait(END_S)

    def end(self) -> int | None:
        """SIGTERM and wait; returns the exit code. Harmless for a process that has ended."""
        if self.popen is None:
            return None
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.terminate()
            try:
                self.popen.wait(END_S)
            except subprocess.TimeoutExpired:
                self.popen.kill()
                self.popen.wait(END_S)
                raise
        return self.popen.returncode

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


def _written(name: str, labels: dict[str, str]) -> str:
    shown = ",".join(f"{key}={value}" for key, value in sorted(labels.items()) if key != "role")
    return f"{name}{{{shown}}}" if shown else name


@contextlib.contextmanager
def running(process: Process) -> Iterator[Process]:
    """Started and answering ``/health`` with 200; ended on leaving."""
    process.start()
    try:
        wait_ready(process)
        yield process
    finally:
        process.end()


def wait_ready(process: Process) -> None:
    def ready() -> bool:
        assert process.popen is not None
        assert process.popen.poll() is None, f"{process.role} ended at start:\n{process.tail()}"
        if process.role in ("prefill", "decode"):
            return process.health() == 200 and bool(process.info()["ready"])
        if process.role == "up":  # before it says so itself, the death of a child is a failed start
            return process.health() == 200 and "ready: http" in process.log.read_text(errors="replace")
        return process.health() == 200

    try:
        wait_until(ready, f"{process.role} ready", START_S)
    except AssertionError as exc:
        raise AssertionError(f"{exc}\n{process.tail()}") from exc


def up(model: Path, folder: Path, *flags: str, **environment: str) -> Process:
    """``pdkv up`` on a free port, not started yet."""
    port = free_port()
    arguments = ["--model", str(model), "--port", str(port), *flags]
    return Process("up", f"http://127.0.0.1:{port}", arguments, folder / f"up-{port}.log", environment)


def worker(role: str, model: Path, folder: Path, *flags: str, port: int | None = None) -> Process:
    """``pdkv prefill`` or ``pdkv decode`` on a free port, with one torch thread, not started yet."""
    port = port or free_port()
    admin = free_port()
    listen = ["--listen", f"127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{admin}"]
    arguments = ["--model", str(model), *listen, "--threads", "1", *flags]
    log = folder / f"{role}-{port}.log"
    return Process(role, f"http://127.0.0.1:{port}", arguments, log, admin_url=f"http://127.0.0.1:{admin}")


def router(folder: Path, prefill: Sequence[Process], decode: Sequence[Process], *flags: str) -> Process:
    port = free_port()
    urls = [flag for p in prefill for flag in ("--prefill", p.url)] + [f for d in decode for f in ("--decode", d.url)]
    admin = free_port()
    arguments = ["--listen", f"127.0.0.1:{port}", "--admin-listen", f"127.0.0.1:{admin}", *urls, *flags]
    log = folder / f"router-{port}.log"
    return Process("router", f"http://127.0.0.1:{port}", arguments, log, admin_url=f"http://127.0.0.1:{admin}")


@dataclass(frozen=True)
class Trio:
    """One prefill worker, one decode worker and a router, each a process of its own."""

    prefill: Process
    decode: Process
    router: Process


@contextlib.contextmanager
def trio(
    model: Path, folder: Path, *flags: str, prefill_flags: Sequence[str] = (), router_flags: Sequence[str] = ()
) -> Iterator[Trio]:
    """Started and ready, ended on leaving. ``flags`` go to both workers."""
    prefill = worker("prefill", model, folder, *flags, *prefill_flags)
    decode = worker("decode", model, folder, *flags)
    front = router(folder, [prefill], [decode], *router_flags)
    with contextlib.ExitStack() as stack:
        for process in (prefill, decode, front):
            process.start()
            stack.callback(process.end)
        for process in (prefill, decode, front):
            wait_ready(process)
        yield Trio(prefill, decode, front)


NEVER_EARLY = ("--num-pages", "80")
"""Of a prefill worker for prompts of 8,192 tokens: too few beside one of more than 14 pages to begin with it before it
is asked for its state. So a lease lasts as long as it computes, however late decode comes, and can be seen."""


@contextlib.contextmanager
def stopped_amid_transfer(
    deployment: Trio, prompts: Iterable[LinkChasingPrompt], max_tokens: int
) -> Iterator[tuple[LinkChasingPrompt, Future[httpx.Response]]]:
    """The first of ``prompts`` that prefill is still computing when decode, which holds a lease, has been stopped: it
    stays so until the block ends. And what is going to be its answer."""
    prefill = deployment.prefill
    assert deployment.decode.popen is not None
    (engine,) = descendants(deployment.decode.popen.pid)
    with ThreadPoolExecutor(1) as pool:
        for prompt in prompts:
            answer = pool.submit(ask, deployment.router.url, prompt.token_ids, max_tokens)
            wait_until(lambda its=answer: prefill.leases() or its.done(), "a lease is granted")
            os.kill(engine, signal.SIGSTOP)
            try:  # of what is computed the release may be on its way
                if [lease.state for lease in prefill.leases()] == ["prefilling"]:
                    yield prompt, answer
                    return
            finally:
                os.kill(engine, signal.SIGCONT)
            assert token_ids(answer.result()) == list(prompt.expected(max_tokens))
    raise AssertionError("no transfer lasted until decode was stopped")


@contextlib.contextmanager
def another_prefill(decode: Process, model: Path, folder: Path, *flags: str) -> Iterator[Trio]:
    """A prefill worker with ``flags`` of its own and a router, in front of a decode worker that runs already."""
    prefill = worker("prefill", model, folder, *flags)
    front = router(folder, [prefill], [decode])
    with running(prefill), running(front):
        yield Trio(prefill, decode, front)


def ask(
    url: str, prompt: Sequence[int] | str, max_tokens: int = 24, *, timeout_s: float = 120.0, **fields: object
) -> httpx.Response:
    """A greedy completion with token ids and the transfer's facts (``pdkv`` block)."""
    body = {
        "model": HTTP.get(f"{url}/v1/models", timeout=10).json()["data"][0]["id"],
        "prompt": prompt if isinstance(prompt, str) else list(prompt),
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        **fields,
    }
    return HTTP.post(f"{url}/v1/completions", json=body, headers={"X-Pdkv-Debug": "1"}, timeout=timeout_s)


def transfer_facts(response: httpx.Response) -> dict[str, Any]:
    """What moving the prompt's state took, from an answer of ``ask``."""
    assert response.status_code == 200, response.text
    return dict(response.json()["pdkv"]["transfer"])


def token_ids(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    return list(response.json()["choices"][0]["token_ids"])
