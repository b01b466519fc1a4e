"""``pdkv lease`` against a real prefill front."""

import contextlib
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from pdkv.daemons.worker_api import DEADLINE, PREFILL_PATH, TRANSFER
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.daemons.scripted_engine import Script
from tests.http import HTTP

IDS = ("a1" + "0" * 30, "a2" + "0" * 30)


@pytest.fixture(scope="module")
def prefill(shared_fleet: Fleet, checkpoint: Path) -> Daemon:
    return shared_fleet.worker("prefill", checkpoint, ready=True)


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, args)


def listed(prefill: Daemon) -> list[str]:
    return [lease["transfer"] for lease in json.loads(pdkv("lease", "ls", prefill.admin, "--json").stdout)["leases"]]


@contextlib.contextmanager
def held(prefill: Daemon) -> Iterator[dict[str, httpx.Response]]:
    """Two jobs that go on until they are ended, and then their answers, by transfer."""
    answers: dict[str, httpx.Response] = {}

    def ask(transfer: str) -> None:
        body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(Script.HANG_PREFILL)}
        headers = {TRANSFER: transfer, DEADLINE: "60"}
        answers[transfer] = HTTP.post(prefill.url + PREFILL_PATH, json=body, headers=headers, timeout=60)

    threads = [threading.Thread(target=ask, args=(transfer,)) for transfer in IDS]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(listed(prefill)) == 2)
    try:
        yield answers
    finally:
        for transfer in listed(prefill):
            HTTP.post(prefill.admin + "/leases/release", json={"transfer": transfer})
        for thread in threads:
            thread.join()


def test_leases_are_listed_oldest_first_and_one_is_ended(prefill: Daemon) -> None:
    assert "granted no lease" in pdkv("lease", "ls", prefill.admin).stdout
    with held(prefill) as answers:
        assert listed(prefill) == list(reversed(IDS)), "as old as the script says"
        table = pdkv("lease", "ls", prefill.admin).stdout.splitlines()
        assert table[0].split()[:2] == ["transfer", "decode"]
        assert table[1].split() == [IDS[1], "decode@scripted", "prefilling", "3", "2.0", "s", "9.5", "s"]
        ambiguous = pdkv("lease", "release", prefill.admin, "a")
        assert ambiguous.exit_code == 1
        assert "2 leases begin with 'a'" in ambiguous.stderr
        assert len(listed(prefill)) == 2
        done = pdkv("lease", "release", prefill.admin, "A2", "--json")
        assert done.exit_code == 0, done.stderr
        assert json.loads(done.stdout)["lease"]["transfer"] == IDS[1]
        wait_until(lambda: IDS[1] in answers)
        assert answers[IDS[1]].status_code == 503
        assert answers[IDS[1]].json()["error"]["code"] == "lease_expired"
        assert listed(prefill) == [IDS[0]]
        gone = pdkv("lease", "release", prefill.admin, IDS[1])
        assert gone.exit_code == 1
        assert "no lease begins with" in gone.stderr


def test_what_has_no_leases_is_named(prefill: Daemon) -> None:
    told = pdkv("lease", "ls", prefill.url)
    assert told.exit_code == 1
    assert "name the admin port of a prefill worker" in told.stderr
    assert "no daemon answers at http://127.0.0.1:9" in pdkv("lease", "ls", "http://127.0.0.1:9").stderr
    unknown = HTTP.post(prefill.admin + "/leases/release", json={"transfer": "ff" * 16})
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "no_lease")
    assert HTTP.post(prefill.admin + "/leases/release", json={"id": 3}).status_code == 400
