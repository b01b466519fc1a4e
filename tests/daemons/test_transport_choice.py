"""Which transports the settings of a worker mean."""

import msgspec
import pytest

from pdkv.daemons import transport_choice
from pdkv.daemons.doctor import doctor_settings
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.transport_choice import describe, make_transport
from pdkv.errors import ConfigError, TransportError
from tests.transport.test_nixl import needs_nixl


def settings(**changes) -> WorkerSettings:
    fields = {"require_transport": None, "max_model_len": 1024, "ucx_library": None, "insecure": False}
    return msgspec.structs.replace(doctor_settings(None, **fields), **changes)


def kinds(**changes) -> list[str]:
    transport = make_transport(settings(**changes))
    try:
        return [way.transport.name for way in transport.ways] if transport.name == "auto" else [transport.name]
    finally:
        transport.close()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["shm", "sockets", "ucx"]),
        ({"require_transport": "tcp"}, ["shm", "sockets", "ucx"]),
        ({"require_transport": "shm"}, ["shm", "ucx"]),
        ({"require_transport": "rdma"}, ["ucx"]),
        ({"ucx_tls": "tcp"}, ["ucx"]),
        ({"transport": "ucx"}, ["ucx"]),
        ({"device": "cuda"}, ["nvlink", "shm", "sockets", "ucx"]),
        ({"device": "cuda", "require_transport": "cuda_ipc"}, ["nvlink", "ucx"]),
        pytest.param({"transport": "nixl"}, ["nixl"], marks=needs_nixl),
        ({"transport": "nvlink"}, ["nvlink"]),
        ({"transport": "shm"}, ["shm"]),
        ({"transport": "sockets"}, ["sockets"]),
    ],
)
def test_ways_of_a_worker(changes, expected):
    assert kinds(**changes) == expected


def test_a_library_that_is_named_must_load(tmp_path):
    with pytest.raises(TransportError):
        make_transport(settings(ucx_library=str(tmp_path / "nothing")))


def test_listens_on_the_data_ports(monkeypatch):
    monkeypatch.setenv("UCX_TCP_PORT_RANGE", "many")
    with pytest.raises(ConfigError, match="'many' is no range of ports"):
        make_transport(settings(transport="sockets"))
    monkeypatch.setenv("UCX_TCP_PORT_RANGE", "39000-39100")
    transport = make_transport(settings(transport="sockets"))
    try:
        assert 39_000 <= transport._where[1] <= 39_100
    finally:
        transport.close()


def test_description_names_all_ways():
    transport = make_transport(settings())
    try:
        assert describe(transport).startswith("auto: shm; sockets; ucx 1.")
    finally:
        transport.close()


@needs_nixl
def test_nixl_is_described_and_takes_one_word_for_its_ucx():
    transport = make_transport(settings(transport="nixl", ucx_tls="tcp"))
    try:
        assert describe(transport).endswith(f"({transport.package.name}), with its own UCX")
    finally:
        transport.close()
    with pytest.raises(TransportError, match="set UCX_TLS in the environment"):
        make_transport(settings(transport="nixl", ucx_tls="tcp,self"))


def test_ucx_carries_gpu_memory_by_mapping_or_not_at_all_without_cards(monkeypatch, tmp_path):
    monkeypatch.setattr(transport_choice, "_CARDS", tmp_path / "none")
    gpu, host = transport_choice._ucx_way(settings(device="cuda")), transport_choice._ucx_way(settings())
    try:
        assert (gpu.reach, host.reach) == ("cuda_ipc", "tcp")
        told = {setting.name: setting.ours for setting in gpu.transport.settings}
        assert told["UCX_TLS"] == "^tcp,cma,sysv"
        assert told["UCX_CUDA_IPC_ENABLE_GET_ZCOPY"] == "on"
    finally:
        gpu.transport.close()
        host.transport.close()
