"""Thirty processes killed at seeded moments under a load of sixteen requests: no wrong token, no hang, no lost page."""

import os
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from pdkv.verify.link_chasing import make_prompt
from tests.e2e.deployment import Process, Trio, ask, descendants, token_ids, trio, wait_ready, wait_until

NUM_KILLS = 30
NUM_CLIENTS = 16
NUM_TOKENS = 8
DEADLINE_S = 40.0
LENGTHS = (64, 129, 300, 2304)


class Load:
    """Sixteen clients that ask one prompt after the other until told to stop, and judge every answer."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.stop = threading.Event()
        self.right = 0
        self.honest_errors = 0
        self.longest_s = 0.0
        self._lock = threading.Lock()

    def client(self, number: int) -> None:
        choice = random.Random(number)
        while not self.stop.is_set():
            prompt = make_prompt(choice.randrange(8), choice.choice(LENGTHS))
            started = time.monotonic()
            try:
                answer = ask(self.url, prompt.token_ids, NUM_TOKENS, timeout_s=DEADLINE_S + 10)
            except (httpx.NetworkError, httpx.RemoteProtocolError, KeyError):
                self.stop.wait(0.2)  # the router itself is gone, or knows no model yet: nobody promised an answer
                continue
            with self._lock:
                self.longest_s = max(self.longest_s, time.monotonic() - started)
                if answer.status_code == 200:
                    assert token_ids(answer) == list(prompt.expected(NUM_TOKENS)), "a wrong token"
                    self.right += 1
                else:
                    assert 500 <= answer.status_code < 600, answer.text
                    assert answer.json()["error"]["message"]
                    self.honest_errors += 1
            if answer.status_code != 200:
                self.stop.wait(0.2)


def victims(fleet: Trio) -> list[tuple[Process, int]]:
    """Every process of the deployment: fronts, engine processes, the router."""
    found = []
    for process in (fleet.prefill, fleet.decode, fleet.router):
        assert process.popen is not None
        found += [(process, pid) for pid in (process.popen.pid, *sorted(descendants(process.popen.pid)))]
    return found


@pytest.mark.timeout(600)
def test_thirty_kills_under_load(link_chasing_model: Path, tmp_path: Path) -> None:
    flags = ("--max-model-len", "2560", "--max-batch", "16", "--lease-ttl", "2", "--log-level", "error")
    router_flags = ("--request-timeout", str(DEADLINE_S), "--poll-interval", "0.2")
    moments = random.Random(30)
    with (
        trio(link_chasing_model, tmp_path, *flags, router_flags=router_flags) as fleet,
        ThreadPoolExecutor(NUM_CLIENTS) as pool,
    ):
        load = Load(fleet.router.url)
        clients = [pool.submit(load.client, number) for number in range(NUM_CLIENTS)]
        try:
            for _ in range(NUM_KILLS):
                time.sleep(moments.uniform(0, 1.5))  # the moment itself is what is drawn
                process, pid = moments.choice(victims(fleet))
                os.kill(pid, signal.SIGKILL)
                assert process.popen is not None
                process.popen.wait(DEADLINE_S)
                process.start()
                wait_ready(process)
                assert not any(client.done() for client in clients), [c.exception() for c in clients if c.done()]
        finally:
            load.stop.set()
        for client in clients:
            client.result(DEADLINE_S + 20)
        wait_until(lambda: fleet.router.health() == 200, "the deployment is ready")
        for worker in (fleet.prefill, fleet.decode):
            wait_until(worker.holds_nothing, f"{worker.role} holds nothing")
        for length in LENGTHS:
            prompt = make_prompt(99, length)
            assert token_ids(ask(fleet.router.url, prompt.token_ids, NUM_TOKENS)) == list(prompt.expected(NUM_TOKENS))
    told = f"{NUM_KILLS} kills: {load.right} right, {load.honest_errors} honest errors, longest {load.longest_s:.1f} s"
    print(told)  # noqa: T201 - for -s
    assert load.right > 0
    assert load.longest_s < DEADLINE_S + 5
