"""The containers of kind-tcp as processes: their commands, variables and files, with other addresses and folders."""

import functools
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdkv.daemons.control_keys import new_keys
from tests.deploy.containers import environment
from tests.deploy.manifests import WITH_KEYS, Object, main_container, pod_of, worker_settings, workload
from tests.e2e.deployment import Process, wait_until
from tests.http import HTTP
from tests.ports import free_port


class Places:
    """What stands for the ports, folders and names of the pods on this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._ports: dict[str, int] = {}

    def port(self, port: str) -> int:
        return self._ports.setdefault(port, free_port())

    def text(self, text: str) -> str:
        text = re.sub(r"0\.0\.0\.0:(\d+)", lambda found: f"127.0.0.1:{self.port(found[1])}", text)
        text = re.sub(r"dns://pdkv-\w+:(\d+)", lambda found: f"dns://localhost:{self.port(found[1])}", text)
        return re.sub(r"(?<![\w/])/(model|etc/pdkv-keys|etc/pdkv)\b", lambda found: str(self.folder / found[1]), text)

    def environment(self, container: Object) -> dict[str, str]:
        own = {name: self.text(value) for name, value in environment(container).items()}
        return {**own, "PDKV_ADVERTISE_HOST": "127.0.0.1"} if "PDKV_ADVERTISE_HOST" in own else own


@pytest.fixture(params=["kind-tcp", WITH_KEYS])
def overlay(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def places(overlay: str, tmp_path: Path) -> Places:
    places = Places(tmp_path)
    (tmp_path / "etc/pdkv").mkdir(parents=True)
    if overlay == WITH_KEYS:
        new_keys(tmp_path / "etc/pdkv-keys")  # what the Secret is made of
    (tmp_path / "etc/pdkv/pdkv.yaml").write_text(places.text(worker_settings(overlay)), encoding="utf-8")
    return places


@pytest.fixture
def pods(overlay: str, places: Places) -> Iterator[dict[str, Process]]:
    """The three daemons, started once the init containers have run."""
    inits = [init for role in ("prefill", "decode") for init in pod_of(workload(overlay, role))["initContainers"]]
    for args in {tuple(init["args"]) for init in inits}:  # both pods' are the same, and so are their folders here
        command = [sys.executable, "-m", "pdkv", *map(places.text, args)]
        subprocess.run(command, check=True, capture_output=True)
    started = {}
    for role in ("prefill", "decode", "router"):
        container = main_container(workload(overlay, role))
        ports = {port["name"]: places.port(str(port["containerPort"])) for port in container["ports"]}
        started[role] = Process(
            role,
            f"http://127.0.0.1:{ports['http']}",
            [places.text(arg) for arg in container["args"][1:]],
            places.folder / f"{role}.log",
            places.environment(container),
            admin_url=f"http://127.0.0.1:{ports['admin']}",
        )
    try:
        for process in started.values():
            process.start()
        yield started
    finally:
        for process in started.values():
            process.end()


def _passes(overlay: str, process: Process, role: str, kind: str) -> bool:
    get = main_container(workload(overlay, role))[f"{kind}Probe"]["httpGet"]
    try:
        return HTTP.get(process.admin_url + get["path"], timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_containers_find_each_other_and_answer(overlay: str, pods: dict[str, Process]) -> None:
    for role, process in pods.items():
        for kind in ("startup", "readiness", "liveness"):
            passes = functools.partial(_passes, overlay, process, role, kind)
            wait_until(passes, f"{role}'s {kind} probe: {process.tail()}", 60)
    body = {"model": "link-chasing", "prompt": "<bos> n1>n2 n2>n3 n1", "max_tokens": 2, "temperature": 0}
    answer = HTTP.post(
        pods["router"].url + "/v1/completions", json=body, headers={"X-Pdkv-Debug": "1"}, timeout=60
    ).json()
    assert answer["choices"][0]["text"].split() == ["n2", "n3"]
    assert answer["pdkv"]["transfer"]["path"] == "tcp"
    keys = [pods[role].info()["control_key"] for role in ("prefill", "decode")]
    assert keys[0] == keys[1]
    assert bool(keys[0]) is (overlay == WITH_KEYS), "the control channel was encrypted, with the keys of the Secret"
    assert [process.end() for process in reversed(pods.values())] == [143] * 3, "drained, not broken off"
