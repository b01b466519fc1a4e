"""The ucx transport beyond the kit: options, settings, the library it says it loaded, the paths it names."""

import logging
import os
import select
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, ReadBatch, TransportAddress
from pdkv.transport.base import ReadStatus
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.ucx import _MAGIC, UcxOptions, UcxTransport, _Worker, path_of, ucx_settings


@pytest.fixture
def ucx():
    made: list[UcxTransport] = []

    def make(**options) -> UcxTransport:
        made.append(UcxTransport(UcxOptions(**options)))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def span(remote: int, local: int, length: int) -> ReadBatch:
    return ReadBatch(*(np.array([value], dtype=np.int64) for value in (0, remote, local, length)))


def wait(transport: UcxTransport):
    assert select.select([transport.fileno()], [], [], 60)[0]
    return transport.poll()


@pytest.mark.parametrize(
    ("info", "path"),
    [
        ("{proto} get into host memory length 8 software emulation sysv/memory 29.0 MB/s", "shm"),
        ("software emulation posix/memory 6700.5 MB/s", "shm"),
        ("zero-copy read from remote cma/memory", "shm"),
        ("software emulation tcp/lo 11.9 MB/s", "tcp"),
        ("zero-copy read rc_mlx5/mlx5_0:1", "rdma"),
        ("zero-copy read dc_mlx5/mlx5_bond_0:1", "rdma"),
        ("zero-copy fenced read cuda_ipc/cuda", "cuda_ipc"),
        ("50% on rc_mlx5/mlx5_0:1 and 50% on tcp/eth0", "tcp"),
        ("", "unknown"),
    ],
)
def test_path_of_what_ucx_says(info, path):
    assert path_of(info) == path


def test_two_transports_in_one_process_read_each_other(ucx):
    """The default settings, both directions, memory that is not shared."""
    ends = [ucx(), ucx()]
    arrays = [np.full(100_000, value, dtype=np.uint8) for value in (1, 2)]
    for end, array in zip(ends, arrays, strict=True):
        end.register(LocalMemory(array.ctypes.data, array.size))
    for reader, target, into in ((0, 1, 0), (1, 0, 1)):
        peer = ends[reader].connect(ends[target].address())
        ends[reader].submit(peer, span(7, arrays[into].ctypes.data + 50_001, 1_001))
        assert [completion.status for completion in wait(ends[reader])] == [ReadStatus.OK]
        assert ends[reader].path(peer) != "unknown"
    assert (arrays[0][50_001:51_002] == 2).all()
    assert (arrays[1][50_001:51_002] == 1).all()


def test_tells_how_ucx_reads_and_by_which_devices(ucx, caplog):
    target, reader = ucx(tls="tcp", net_devices="lo"), ucx(tls="tcp", net_devices="lo")
    source, into = np.full(100_000, 7, np.uint8), np.zeros(100_000, np.uint8)
    target.register(LocalMemory(source.ctypes.data, source.size))
    reader.register(LocalMemory(into.ctypes.data, into.size))
    address = target.address()
    worker = msgspec.msgpack.decode(unseal(_MAGIC, address.address, ""), type=_Worker)
    on_gpu = msgspec.msgpack.encode(msgspec.structs.replace(worker, on_gpu=True))
    host = reader.connect(address)
    gpu = reader.connect(msgspec.structs.replace(address, address=seal(_MAGIC, on_gpu)))
    assert reader.note(host) == ""
    assert not reader.crawls(gpu)
    for peer in (host, gpu):
        reader.submit(peer, span(0, into.ctypes.data, into.size))
        assert wait(reader)[0].status is ReadStatus.OK
        assert reader.note(peer) == "UCX: software emulation tcp/lo, lanes tcp/lo"
    assert not reader.crawls(host)
    assert reader.crawls(gpu), "what UCX emulates it copies piece by piece where a GPU's memory is concerned"
    assert caplog.text.count(f"UCX copies GPU memory of peer {gpu} piece by piece") == 1


def test_says_what_it_loaded(ucx, caplog):
    caplog.set_level(logging.INFO, logger="pdkv.transport.ucx")
    transport = ucx()
    assert transport.library.version.count(".") == 2
    assert transport.library.path in caplog.text
    assert transport.library.version in caplog.text
    assert not [record for record in caplog.records if "refuses" in record.message], "this UCX knows all we set"


def test_inherited_settings_win_with_a_warning(ucx, caplog, monkeypatch):
    monkeypatch.setenv("UCX_KEEPALIVE_INTERVAL", "7s")
    transport = ucx(tls="tcp")
    setting = next(s for s in transport.settings if s.name == "UCX_KEEPALIVE_INTERVAL")
    assert (setting.inherited, setting.value, setting.ours) == (True, "7s", "500ms")
    assert "UCX_KEEPALIVE_INTERVAL=7s is inherited and wins" in caplog.text


def test_settings_follow_options():
    by_name = {s.name: s.value for s in ucx_settings(UcxOptions(keepalive_ms=250), {})}
    assert by_name["UCX_KEEPALIVE_INTERVAL"] == "250ms"
    assert by_name["UCX_TLS"] == "^cma,sysv"
    assert "UCX_NET_DEVICES" not in by_name
    forced = {s.name: s.value for s in ucx_settings(UcxOptions(tls="tcp", net_devices="lo"), {})}
    assert (forced["UCX_TLS"], forced["UCX_NET_DEVICES"]) == ("tcp", "lo")


def test_library_that_is_none(tmp_path):
    rubbish = tmp_path / "libucp.so.0"
    rubbish.write_bytes(b"not a library")
    with pytest.raises(TransportError, match=r"cannot start.*pip install"):
        UcxTransport(UcxOptions(library=str(rubbish)))


def test_transports_that_ucx_does_not_have():
    with pytest.raises(TransportError, match="cannot start"):
        UcxTransport(UcxOptions(tls="pigeon"))


def test_damaged_key_is_refused(ucx):
    target, reader = ucx(), ucx()
    array = np.zeros(4096, dtype=np.uint8)
    target.register(LocalMemory(array.ctypes.data, array.size))
    address = target.address()
    damaged = address.memories[0].__class__(array.ctypes.data, array.size, address.memories[0].key[:-1])
    with pytest.raises(TransportError, match="key of the peer's memory 0"):
        reader.connect(TransportAddress("ucx", address.address, (damaged,)))


def test_bad_registrations_and_batches(ucx):
    transport = ucx()
    for memory in (LocalMemory(0, 10), LocalMemory(4096, 0), LocalMemory(4096, -1)):
        with pytest.raises(TransportError, match="cannot register"):
            transport.register(memory)
    one, two = np.zeros(1, np.int64), np.zeros(2, np.int64)
    with pytest.raises(TransportError, match="differ in length"):
        transport.submit(0, ReadBatch(memory=one, remote=two, local=one, length=one))
    transport.close()
    with pytest.raises(TransportError, match="closed"):
        transport.register(LocalMemory(4096, 4096))


def test_descriptors_and_threads_are_given_back(ucx):
    def open_things():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    target = ucx(tls="tcp")
    array = np.zeros(1 << 20, dtype=np.uint8)
    target.register(LocalMemory(array.ctypes.data, array.size))

    def life():
        reader = UcxTransport(UcxOptions(tls="tcp"))
        reader.register(LocalMemory(array.ctypes.data, array.size))
        for _ in range(3):
            peer = reader.connect(target.address())
            reader.submit(peer, span(0, array.ctypes.data + 4096, 4096))
            wait(reader)
            reader.close_peer(peer)
        reader.close()

    life()  # whatever UCX makes once
    before = open_things()
    for _ in range(3):
        life()
    fds, threads = open_things()
    assert threads == before[1]
    assert fds <= before[0] + 3, "at most what the target keeps for readers that have just left"


def test_idle_transport_uses_no_cpu(ucx):
    """Two connected, idle transports: the threads sleep (state S), they do not spin."""
    target, reader = ucx(tls="posix,self"), ucx(tls="posix,self")
    array = np.zeros(8192, dtype=np.uint8)
    target.register(LocalMemory(array.ctypes.data, array.size))
    reader.register(LocalMemory(array.ctypes.data, array.size))
    peer = reader.connect(target.address())
    reader.submit(peer, span(0, array.ctypes.data + 4096, 4096))
    wait(reader)
    before = _ticks_of_native_threads()
    select.select([reader.fileno()], [], [], 1.0)
    assert _ticks_of_native_threads() - before <= 10, "a spinning thread would use 100 ticks a second"


def _ticks_of_native_threads() -> int:
    ticks = 0
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/stat") as stat:
            name, fields = stat.read().split("(", 1)[1].rsplit(")", 1)
        if name == "pdkv-ucx":
            ticks += sum(map(int, fields.split()[11:13]))
    return ticks


def test_imports_without_the_binding():
    code = """
import sys
sys.modules["pdkv.transport._ucp"] = None
from pdkv.transport.ucx import UcxTransport
from pdkv.errors import TransportError
try:
    UcxTransport()
except TransportError as error:
    sys.exit("build_ext" not in str(error))
sys.exit(2)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_forked_child_ends_without_its_parents_thread(ucx):
    """A child that forked leaves the engine alone, and so can exit."""
    code = """
import os, sys
from pdkv.transport.ucx import UcxOptions, UcxTransport
transport = UcxTransport(UcxOptions(tls="tcp"))
child = os.fork()
if child == 0:
    transport.close()
    os._exit(0)
_, status = os.waitpid(child, 0)
transport.close()
sys.exit(status)
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)
