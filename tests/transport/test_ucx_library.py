"""Which libucp is chosen, from directories that look like installed UCXs."""

import pytest

from pdkv.errors import TransportError
from pdkv.transport.ucx_library import LIBRARY, find_ucx_library


@pytest.fixture
def install(tmp_path):
    def make(name: str, *, infiniband: bool, cuda: bool = False) -> str:
        place = tmp_path / name
        (place / "ucx").mkdir(parents=True)
        (place / LIBRARY).touch()
        (place / "ucx/libuct_cma.so.0").touch()
        if infiniband:
            (place / "ucx/libuct_ib.so.0").touch()
        if cuda:
            (place / "ucx/libuct_cuda.so.0").touch()
        return str(place)

    return make


def test_system_with_infiniband_beats_the_wheel(install):
    plain, rdma = install("plain", infiniband=False), install("rdma", infiniband=True)
    found = find_ucx_library(system_directories=[plain, rdma])
    assert found.path == f"{rdma}/{LIBRARY}"
    assert (found.source, found.has_infiniband) == ("system", True)


def test_wheel_beats_a_system_without_infiniband(install):
    found = find_ucx_library(system_directories=[install("plain", infiniband=False)])
    assert (found.source, found.has_infiniband) == ("wheel", False)
    assert found.path.endswith(f"libucx/lib/{LIBRARY}")


def test_system_without_infiniband_is_better_than_none(install):
    place = install("plain", infiniband=False)
    found = find_ucx_library(system_directories=["/nowhere", place], wheel="pdkv_no_such_wheel")
    assert (found.path, found.source) == (f"{place}/{LIBRARY}", "system")


def test_explicit_beats_all(install):
    rdma, asked = install("rdma", infiniband=True), install("asked", infiniband=False)
    for named in (asked, f"{asked}/{LIBRARY}"):
        found = find_ucx_library(named, system_directories=[rdma])
        assert (found.path, found.source, found.has_infiniband) == (f"{asked}/{LIBRARY}", "explicit", False)


def test_nothing_found_says_what_to_install():
    with pytest.raises(TransportError, match="pip install libucx"):
        find_ucx_library(system_directories=[], wheel="pdkv_no_such_wheel")
    with pytest.raises(TransportError, match="/no/such/libucp.so.0, is no file"):
        find_ucx_library("/no/such/libucp.so.0")


def test_gpu_memory_needs_a_ucx_with_cuda(install):
    blind, seeing = install("blind", infiniband=True), install("seeing", infiniband=False, cuda=True)
    assert find_ucx_library(system_directories=[blind], cuda=True).source == "wheel"  # it has CUDA's modules
    found = find_ucx_library(system_directories=[blind, seeing], wheel="pdkv_no_such_wheel", cuda=True)
    assert (found.path, found.has_cuda) == (f"{seeing}/{LIBRARY}", True)
    with pytest.raises(TransportError, match="no UCX found that carries GPU memory .*blind.*: install libucx-cu12"):
        find_ucx_library(system_directories=[blind], wheel="pdkv_no_such_wheel", cuda=True)
    assert not find_ucx_library(blind, cuda=True).has_cuda  # asked for by name: refused when it meets GPU memory
