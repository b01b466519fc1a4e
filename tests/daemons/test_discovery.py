"""Workers found through DNS: real resolution, scripted names that come and go, a router over real workers."""

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import pytest

from pdkv.daemons.config import RouterConfig, load
from pdkv.daemons.discovery import Lookup, resolve_by_system
from pdkv.daemons.worker_api import WorkerInfo
from pdkv.daemons.worker_client import WholeAnswer, WorkerClient, WorkerLostError
from pdkv.daemons.worker_pool import WorkerPool
from pdkv.errors import ConfigError
from tests.daemons.conftest import Daemon, Fleet, wait_until
from tests.http import HTTP
from tests.ports import free_port

TARGET = "dns://prefill.pdkv.svc:8100"


class Zone:
    """A name server whose answer the test sets; it is asked through the same seam as the system's."""

    def __init__(self, *hosts: str) -> None:
        self.answer: tuple[str, ...] | OSError = hosts
        self.asked = 0

    async def resolve(self, _host: str, _port: int) -> tuple[str, ...]:
        self.asked += 1
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer


def _look(lookup: Lookup) -> bool:
    return asyncio.run(lookup.look())


def test_the_system_resolves_a_name_to_its_addresses() -> None:
    hosts = asyncio.run(resolve_by_system("localhost", 8100))
    assert set(hosts) <= {"127.0.0.1", "::1"}
    assert hosts


def test_a_name_that_does_not_exist_is_no_error_and_has_no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_args: object, **_kwargs: object) -> Iterator[object]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    assert asyncio.run(resolve_by_system("pdkv-prefill", 8100)) == ()


def test_a_name_server_that_does_not_answer_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_args: object, **_kwargs: object) -> Iterator[object]:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    with pytest.raises(OSError, match="Temporary failure"):
        asyncio.run(resolve_by_system("pdkv-prefill", 8100))


def test_a_lookup_follows_its_name() -> None:
    zone = Zone("10.0.0.2", "10.0.0.1", "10.0.0.1", "fd00::1")
    lookup = Lookup(TARGET, zone.resolve)
    assert lookup.problem == "not looked up yet"
    assert _look(lookup)
    assert lookup.urls == ("http://10.0.0.1:8100", "http://10.0.0.2:8100", "http://[fd00::1]:8100")
    assert lookup.problem == ""
    zone.answer = ("fd00::1", "10.0.0.1", "10.0.0.2")
    assert not _look(lookup), "another order is no change"
    zone.answer = ("10.0.0.2",)
    assert _look(lookup)
    assert lookup.urls == ("http://10.0.0.2:8100",)


def test_a_failed_lookup_takes_no_worker_away_and_a_name_without_address_takes_all() -> None:
    zone = Zone("10.0.0.1")
    lookup = Lookup(TARGET, zone.resolve)
    _look(lookup)
    zone.answer = socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    assert not _look(lookup)
    assert lookup.urls == ("http://10.0.0.1:8100",)
    assert lookup.problem == "cannot be resolved: Temporary failure in name resolution"
    zone.answer = ()
    assert _look(lookup)
    assert (lookup.urls, lookup.problem) == ((), "has no address")


class _Answering(WorkerClient):
    """A client whose workers are ``infos``, by host; others refuse the connection."""

    def __init__(self, infos: dict[str, WorkerInfo]) -> None:
        super().__init__(1.0, 1.0)
        self._infos = infos

    async def ask(self, method: str, url: str, *_: object, **__: object) -> WholeAnswer:
        host = urlsplit(url).hostname
        if host not in self._infos:
            raise WorkerLostError("cannot connect: refused")
        return WholeAnswer(200, msgspec.json.encode(self._infos[host]))


def _info(role: str, incarnation: str) -> WorkerInfo:
    return WorkerInfo(role=role, ready=True, model="m3", incarnation=incarnation, manifest_digest="same")


async def _until(condition) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def test_a_pool_takes_up_workers_that_come_and_drops_those_that_go() -> None:
    zone = Zone()
    infos = {f"10.0.0.{i}": _info("prefill", f"p{i}") for i in (1, 2)} | {"10.1.0.1": _info("decode", "d1")}

    async def play() -> None:
        async with _Answering(infos) as client:
            pool = WorkerPool(client, [TARGET], ["http://10.1.0.1:8200"], 0.01, zone.resolve)

            def prefills() -> list[str]:
                return [worker.url for worker in pool.workers() if worker.role == "prefill"]

            async with pool.polling():
                await _until(lambda: zone.asked > 1)
                assert prefills() == []
                assert pool.missing()[0] == f"no prefill worker is ready ({TARGET}: has no address)"
                zone.answer = ("10.0.0.1",)
                await _until(lambda: pool.next_pair() is not None)
                zone.answer = ("10.0.0.2", "10.0.0.1")
                await _until(lambda: len(pool.pairs()) == 2)
                first = pool.pairs()[0].prefill
                zone.answer = ("10.0.0.2",)
                await _until(lambda: len(pool.pairs()) == 1)
                assert prefills() == ["http://10.0.0.2:8100"]
                await pool.doubt(first, reason="its request broke off")  # one that has gone stays gone
                assert prefills() == ["http://10.0.0.2:8100"]
                zone.answer = socket.gaierror(socket.EAI_AGAIN, "Temporary failure")
                asked = zone.asked
                await _until(lambda: zone.asked > asked + 1)
                assert len(pool.pairs()) == 1
                zone.answer = ()
                await _until(lambda: not pool.pairs())
            assert len(asyncio.all_tasks()) == 1, "nobody looks on after the end"

    asyncio.run(play())


def test_a_worker_with_two_addresses_is_used_as_one() -> None:
    zone = Zone("10.0.0.1", "fd00::1")
    infos = {host: _info("prefill", "p1") for host in ("10.0.0.1", "fd00::1")} | {"10.1.0.1": _info("decode", "d1")}

    async def play() -> None:
        async with _Answering(infos) as client:
            pool = WorkerPool(client, [TARGET], ["http://10.1.0.1:8200"], 0.01, zone.resolve)
            async with pool.polling():
                await _until(lambda: all(worker.info for worker in pool.workers()) and len(list(pool.workers())) == 3)
                assert len(pool.pairs()) == 1

    asyncio.run(play())


@pytest.mark.parametrize("target", ["dns://prefill", "dns://prefill:0", "dns://:8100", "ftp://prefill:8100"])
def test_a_target_that_cannot_be_looked_up_is_refused(target: str) -> None:
    with pytest.raises(ConfigError, match="prefill"):
        load(RouterConfig, {"prefill_urls": [target], "decode_urls": ["http://d:1"]})


def test_a_router_finds_its_workers_by_name(fleet: Fleet, checkpoint: Path) -> None:
    port = free_port()
    prefill, decode = fleet.worker("prefill", checkpoint, port), fleet.worker("decode", checkpoint)
    named = [_named(worker) for worker in (prefill, decode)]
    router = fleet.router(*[[name] for name in named])
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "seed": 1}
    answer = HTTP.post(router.url + "/v1/completions", json=body, timeout=60)
    assert answer.json()["choices"][0]["text"] == "n0 n1 n2 n3"
    seen = {worker["url"] for worker in HTTP.get(router.url + "/health").json()["workers"] if worker["ready"]}
    assert seen == {prefill.url, decode.url}
    assert prefill.url not in HTTP.get(router.admin + "/metrics").text, "labels are bounded"
    prefill.process.kill()
    prefill.process.wait()
    wait_until(lambda: HTTP.get(router.url + "/health").status_code == 503)
    fleet.worker("prefill", checkpoint, port)  # another life at the same address, as after a pod's restart
    wait_until(lambda: HTTP.get(router.url + "/health").status_code == 200)


def test_a_router_says_which_name_has_no_worker(fleet: Fleet) -> None:
    nobody = Daemon.__new__(Daemon)
    nobody.url = "dns://localhost:1"
    router = fleet.router([nobody], [nobody], ready=False)
    wait_until(lambda: "http://127.0.0.1:1: cannot connect" in HTTP.get(router.url + "/health").text)


def _named(worker: Daemon) -> Daemon:
    named = Daemon.__new__(Daemon)
    named.url = worker.url.replace("http://127.0.0.1", "dns://localhost")
    return named
