"""``pdkv ping`` and ``pdkv drain`` against real daemons."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from tests.daemons.conftest import Daemon, Fleet
from tests.daemons.scripted_engine import Script
from tests.http import HTTP


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, args)


@pytest.fixture
def trio(fleet: Fleet, checkpoint: Path) -> tuple[Daemon, Daemon, Daemon]:
    """Prefill, decode, router."""
    prefill, decode = (fleet.worker(role, checkpoint, ready=True) for role in ("prefill", "decode"))
    return prefill, decode, fleet.router([prefill], [decode])


def test_a_ping_tells_each_role_and_what_is_wrong(trio: tuple[Daemon, Daemon, Daemon]):
    for role, daemon in zip(("prefill", "decode", "router"), trio, strict=True):
        told = pdkv("ping", daemon.admin)
        assert told.exit_code == 0, told.stderr
        assert told.stdout.startswith(f"{role} at {daemon.admin} is live")
    prefill, _, router = trio
    assert pdkv("ping", router.admin, "--ready").exit_code == 0
    HTTP.post(prefill.admin + "/drain")
    told = pdkv("ping", prefill.admin, "--ready")
    assert told.exit_code == 1
    assert "is not ready" in told.stdout
    assert "not_draining: " in told.stdout
    answer = json.loads(pdkv("ping", prefill.admin, "--ready", "--json").stdout)
    assert (answer["schema"], answer["asked"], answer["verdict"]["ok"]) == ("pdkv.ping/v1", "ready", False)


def test_a_drain_waits_for_what_runs_and_says_when_it_has_not_ended(trio: tuple[Daemon, Daemon, Daemon]):
    router = trio[2]
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": int(Script.HANG_AFTER_TWO), "stream": True}
    with HTTP.stream("POST", router.url + "/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        told = pdkv("drain", router.admin, "--wait", "0.001")  # its time is up with the first answer
        assert told.exit_code == 7
        assert "1 request left after" in told.stderr
        assert "1 still run" in told.stdout
        assert pdkv("drain", router.admin).exit_code == 0, "asked not to wait, it does not complain"
    told = pdkv("drain", router.admin, "--wait", "30", "--json")
    assert told.exit_code == 0, told.stderr
    assert json.loads(told.stdout)["in_flight"] == 0
    assert HTTP.post(router.url + "/v1/completions", json=body).status_code == 503


def test_what_is_no_admin_port_is_named(trio: tuple[Daemon, Daemon, Daemon]):
    told = pdkv("ping", trio[0].url)
    assert told.exit_code == 1
    assert "is no admin port" in told.stderr
    assert "--admin-listen" in told.stderr
    told = pdkv("drain", "http://127.0.0.1:9")
    assert told.exit_code == 1
    assert "no daemon's admin port answers at http://127.0.0.1:9" in told.stderr
