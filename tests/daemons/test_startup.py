"""``/startupz`` and ``/version`` of real daemons."""

from pathlib import Path

import pdkv
from pdkv.schema import PROTOCOL_VERSION
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.http import HTTP


def _probe(daemon: Daemon, path: str) -> tuple[int, dict[str, bool]]:
    answer = HTTP.get(daemon.admin + path)
    body = answer.json()
    assert body["ok"] == (answer.status_code == 200)
    return answer.status_code, {condition["name"]: condition["ok"] for condition in body["conditions"]}


def test_a_daemon_has_started_once_and_stays_so(fleet: Fleet, checkpoint: Path) -> None:
    worker = fleet.worker("prefill", checkpoint)
    nobody = Daemon.__new__(Daemon)
    nobody.url = "http://127.0.0.1:1"
    router = fleet.router([worker], [nobody], ready=False)
    wait_until(lambda: _probe(worker, "/startupz")[0] == 200)
    started = {"model_loaded": True, "regions_registered": True}
    assert _probe(worker, "/startupz") == (200, started)
    assert _probe(router, "/startupz") == (200, {"configured": True})
    assert _probe(router, "/readyz")[0] == 503
    HTTP.post(worker.admin + "/drain")
    assert _probe(worker, "/readyz")[0] == 503
    assert _probe(worker, "/startupz") == (200, started), "a probe of the start must not restart what drains"
    for url in (worker.url, worker.admin, router.url, router.admin):
        told = HTTP.get(url + "/version").json()
        assert (told["schema"], told["version"]) == ("pdkv.version/v1", pdkv.__version__)
        assert told["protocol"] == PROTOCOL_VERSION
