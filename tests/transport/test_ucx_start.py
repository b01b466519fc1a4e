"""UCX's start beside interfaces that come and go: what is tried again, how often, and both users of it."""

from types import SimpleNamespace

import pytest

import pdkv.transport.ucx as ucx_module
from pdkv.errors import TransportError
from pdkv.transport import ucx_start
from pdkv.transport.nixl_agent import NixlAgent, NixlPackage
from pdkv.transport.ucx import UcxOptions, UcxTransport
from pdkv.transport.ucx_start import started


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Those that were made; none takes any time."""
    made: list[float] = []
    monkeypatch.setattr(ucx_start, "time", SimpleNamespace(sleep=made.append))
    return made


class Start:
    """Raises what it is given, one after another, and then succeeds."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)

    def __call__(self) -> str:
        if self.failures:
            raise self.failures.pop(0)
        return "started"


@pytest.mark.parametrize("failures", [0, 1, 7])
def test_what_may_pass_is_tried_again(failures: int, pauses: list[float]):
    assert started(Start(*[OSError("gone")] * failures), lambda _: True) == "started"
    assert len(pauses) == failures


def test_it_is_given_up_within_a_second(pauses: list[float]):
    errors = [OSError(str(nth)) for nth in range(99)]
    with pytest.raises(OSError, match="7"):
        started(Start(*errors), lambda _: True)
    assert 0.5 < sum(pauses) <= 1


def test_what_will_not_pass_is_raised_at_once(pauses: list[float]):
    with pytest.raises(ValueError, match="bad"):
        started(Start(ValueError("bad")), lambda error: isinstance(error, OSError))
    assert not pauses


def test_ucx_starts_when_the_interface_is_there(monkeypatch: pytest.MonkeyPatch, pauses: list[float]):
    real, failures = ucx_module.Engine, [OSError("ucp_worker_create: No such device")] * 2

    def engine(*arguments: object) -> object:
        if failures:
            raise failures.pop()
        return real(*arguments)

    monkeypatch.setattr(ucx_module, "Engine", engine)
    UcxTransport().close()
    assert len(pauses) == 2


def test_a_library_that_is_none_is_told_at_once(tmp_path, pauses: list[float]):
    (tmp_path / "libucp.so.0").write_text("no library")
    with pytest.raises(TransportError, match="cannot start"):
        UcxTransport(UcxOptions(library=str(tmp_path / "libucp.so.0")))
    assert not pauses


class BackendError(Exception):
    pass


def _package(failures: int) -> NixlPackage:
    class Agent:
        made = 0

        def __init__(self, name: str, config: object) -> None:
            pass

        def createBackend(self, backend: str, parameters: dict[str, str]) -> int:  # noqa: N802  NIXL's name
            Agent.made += 1
            if Agent.made <= failures:
                raise BackendError("NIXL_ERR_BACKEND")
            return 7

    bindings = SimpleNamespace(nixlAgent=Agent, nixlAgentConfig=SimpleNamespace, NIXL_THREAD_SYNC_NONE=0)
    return NixlPackage("nixl", "1.5.1", bindings, (BackendError,))


def test_nixl_starts_when_the_interface_is_there(pauses: list[float]):
    NixlAgent(_package(failures=2), "me", {})
    assert len(pauses) == 2
    with pytest.raises(TransportError, match="cannot start: NIXL_ERR_BACKEND"):
        NixlAgent(_package(failures=99), "me", {})
