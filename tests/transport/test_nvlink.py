"""nvlink beyond the kit, on a GPU made of host memory: what it refuses, how it divides work, how it ends."""

import os
import select
import subprocess
import sys

import msgspec
import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch
from pdkv.transport import nvlink_address
from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance_rig import Rig
from pdkv.transport.conformance_target import SpawnedTarget, TransportSpec
from pdkv.transport.gpu import Exported
from pdkv.transport.nvlink import NvlinkTransport
from pdkv.transport.process_life import Life, ProcessHome

from .host_gpu import HostGpu, HostGpuMemory
from .reading import ended, span

MIB = 1 << 20
SPEC = TransportSpec("tests.transport.host_gpu:make", path="cuda_ipc", memory="tests.transport.host_gpu:HostGpuMemory")


class Reader:
    """A reader of one MiB whose GPU can be told to refuse, and to wait."""

    def __init__(self) -> None:
        self.gpu = HostGpu()
        self.transport = NvlinkTransport(2, row_bytes=4096, gpu_of=lambda _address: self.gpu)
        self.into = HostGpuMemory(8 * MIB)
        self.transport.register(self.into.memory)

    def read(self, peer, *lengths: int):
        """Read so many bytes each, one behind the other, and wait."""
        local = np.cumsum([0, *lengths])[:-1]
        zeros = np.zeros(len(lengths), dtype=np.int64)
        self.transport.submit(
            peer, ReadBatch(zeros, local, local + self.into.memory.address, np.array(lengths, dtype=np.int64))
        )
        return ended(self.transport)


@pytest.fixture
def reader():
    made = Reader()
    yield made
    made.gpu.gate.set()
    made.transport.close()


@pytest.fixture(scope="module")
def target():
    made = SpawnedTarget(SPEC, 1)
    yield made
    made.close()


@pytest.fixture
def mortal():
    made = SpawnedTarget(SPEC, 1)
    yield made
    made.kill()


# ---- parts ----


def test_rows_go_in_batches_that_grow(reader: Reader, target: SpawnedTarget) -> None:
    """So that the first are copied while the driver is told of the others."""
    peer = reader.transport.connect(target.address)
    assert reader.read(peer, *[4096] * 1000).status is ReadStatus.OK
    assert [spans for spans, _ in reader.gpu.copies] == [4, 16, 64, 256, 660]


def test_fragments_go_in_kernels_that_grow_on_both_streams(reader: Reader, target: SpawnedTarget) -> None:
    peer = reader.transport.connect(target.address)
    assert reader.read(peer, *[64] * 50_000).status is ReadStatus.OK
    pieces, num_long, blocks, streams = zip(*reader.gpu.gathers, strict=True)
    assert pieces == (1024, 4096, 16384, 28496)
    assert set(num_long) == {0}
    assert set(blocks) == {1}, "two kernels at a time have as many blocks as were asked for"
    assert streams[0] == streams[2] != streams[1] == streams[3]


def test_each_part_of_a_batch_goes_its_way(reader: Reader, target: SpawnedTarget) -> None:
    peer = reader.transport.connect(target.address)
    assert reader.read(peer, 5000, 40, 4096, 4095).status is ReadStatus.OK
    assert [spans for spans, _ in reader.gpu.copies] == [2]
    assert [spans for spans, *_ in reader.gpu.gathers] == [2]
    assert reader.transport.path(peer) == "cuda_ipc"


def test_tables_are_used_again(reader: Reader, target: SpawnedTarget) -> None:
    """More fragments than one launch takes, twice: every byte arrives, and the second read allocates nothing."""
    peer = reader.transport.connect(target.address)
    lengths = [64] * 70_000
    with Rig(SPEC) as rig:
        wanted = rig.expected(target, 0)[: 64 * 70_000]
    made = []
    for _ in range(2):
        reader.into.fill(0)
        assert reader.read(peer, *lengths).status is ReadStatus.OK
        assert np.array_equal(reader.into.bytes[: wanted.size], wanted)
        made.append(len(reader.transport._tables))
    assert made[0] == made[1] > 1


def test_a_bad_span_far_behind_fails_the_read_and_nothing_after_it_lands(reader: Reader, target: SpawnedTarget) -> None:
    """Parts before it have been launched: the read ends when they have, and has touched nothing else."""
    peer = reader.transport.connect(target.address)
    count, bad = 20_000, 15_000
    at = np.arange(count, dtype=np.int64) * 64
    local = at + reader.into.memory.address
    local[bad] = reader.into.memory.address + reader.into.memory.length - 63
    reader.into.fill(0xEE)
    reader.transport.submit(peer, ReadBatch(np.zeros_like(at), at, local, np.full(count, 64)))
    completion = ended(reader.transport)
    assert (completion.status, completion.error) == (
        ReadStatus.FAILED,
        "the destination lies outside registered memory",
    )
    with Rig(SPEC) as rig:
        wanted = rig.expected(target, 0)
    landed = 64 * (1024 + 4096)  # the parts before the one of the bad span
    assert np.array_equal(reader.into.bytes[:landed], wanted[:landed])
    assert (reader.into.bytes[landed:] == 0xEE).all()
    assert reader.read(peer, 5000, 40).status is ReadStatus.OK


# ---- refusals ----


@pytest.mark.parametrize("blocks", [0, -1, 5000])
def test_refuses_absurd_numbers_of_blocks(blocks: int) -> None:
    with pytest.raises(TransportError, match="between 1 and 1024"):
        NvlinkTransport(blocks)


def test_refuses_memory_that_is_no_gpus(reader: Reader) -> None:
    with pytest.raises(TransportError, match="takes memory of NVIDIA GPUs"):
        reader.transport.register(LocalMemory(reader.into.memory.address, 64))
    with pytest.raises(TransportError, match="not one allocation of the GPU"):
        reader.transport.register(msgspec.structs.replace(reader.into.memory, length=1 << 40))


def test_says_why_memory_cannot_be_exported(reader: Reader) -> None:
    reader.gpu.refuse.add("export")
    with pytest.raises(TransportError, match=r"cannot be mapped by other processes .*allocate them by cudaMalloc"):
        reader.transport.register(reader.into.memory)


def test_without_cuda_says_what_is_missing() -> None:
    transport = NvlinkTransport()
    memory = HostGpuMemory(64).memory
    try:
        with pytest.raises(TransportError, match=r"cuda-bindings|NVIDIA driver|CUDA refuses"):
            transport.register(memory)
    finally:
        transport.close()


def test_connects_only_with_room_to_read_into(target: SpawnedTarget) -> None:
    transport = NvlinkTransport()
    try:
        with pytest.raises(TransportError, match="register the memory that is read into"):
            transport.connect(target.address)
    finally:
        transport.close()


def _changed(target: SpawnedTarget, **changes: object):
    home, _ = nvlink_address.decode(target.address)
    home = msgspec.structs.replace(home, **changes)
    return nvlink_address.encode("nvlink", home, target.address.memories)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"boot_id": "other"}, "on another host"),
        ({"pid_space": 1}, "another process namespace.*hostPID"),
        ({"pid": os.getpid()}, "this very process"),
        ({"gpu": "other"}, "no peer access to other"),
    ],
)
def test_refuses_peers_that_cuda_cannot_map(reader: Reader, target: SpawnedTarget, changes, why: str) -> None:
    with pytest.raises(TransportError, match=why):
        reader.transport.connect(_changed(target, **changes))


def test_tells_of_the_ipc_namespace_when_cuda_refuses_to_map(reader: Reader, target: SpawnedTarget) -> None:
    reader.gpu.refuse.add("map")
    with pytest.raises(TransportError, match=r"cannot be mapped: CUDA refuses: map; .*try hostIPC"):
        reader.transport.connect(_changed(target, ipc_space=1))
    with pytest.raises(TransportError, match=r"CUDA refuses: map$"):
        reader.transport.connect(target.address)


def test_a_peer_without_streams_leaves_nothing_mapped(reader: Reader, target: SpawnedTarget) -> None:
    reader.gpu.refuse.add("make_stream")
    with pytest.raises(TransportError, match="no room for another peer"):
        reader.transport.connect(target.address)
    assert not reader.gpu.mapped


def test_refuses_damaged_keys_and_offsets(reader: Reader, target: SpawnedTarget) -> None:
    def with_key(key: bytes):
        memories = (MemoryDescriptor(1, 64, key),)
        return msgspec.structs.replace(target.address, memories=memories)

    with pytest.raises(TransportError, match="key of the peer's memory 0"):
        reader.transport.connect(with_key(b"x" * 40))
    with pytest.raises(TransportError, match="outside its allocation"):
        reader.transport.connect(with_key(nvlink_address.encode_key(Exported(b"handle", -1))))


# ---- failures of the driver ----


@pytest.mark.parametrize(
    ("call", "name"),
    [
        ("push", "cuCtxPushCurrent"),
        ("copy", "cuMemcpyBatchAsync"),
        ("gather", "cuLaunchKernel"),
        ("mark", "cuEventRecord"),
        ("wait", "cuEventSynchronize"),
    ],
)
def test_what_the_driver_refuses_fails_its_read_only(
    reader: Reader, target: SpawnedTarget, call: str, name: str
) -> None:
    peer = reader.transport.connect(target.address)
    reader.gpu.refuse.add(call)
    failed = reader.read(peer, 5000, 40)
    assert (failed.status, failed.error) == (ReadStatus.FAILED, f"CUDA refuses: {name}, 999")
    assert reader.transport.path(peer) == "unknown"
    reader.gpu.refuse.clear()
    assert reader.read(peer, 5000, 40).status is ReadStatus.OK


# ---- ends ----


def test_a_close_completes_only_when_copies_have_ended(reader: Reader, target: SpawnedTarget) -> None:
    peer = reader.transport.connect(target.address)
    reader.gpu.gate.clear()
    read = reader.transport.submit(peer, span(0, reader.into.memory.address, MIB))
    reader.transport.close_peer(peer)
    assert reader.transport.poll() == []
    assert reader.gpu.mapped, "memory is unmapped under a copy"
    reader.gpu.gate.set()
    completion = ended(reader.transport)
    assert (completion.read, completion.status) == (read, ReadStatus.CANCELLED)


def test_reads_under_way_fail_when_the_peer_dies_before_they_end(reader: Reader, mortal: SpawnedTarget) -> None:
    """Nobody can say what a dead process's memory holds."""
    peer = reader.transport.connect(mortal.address)
    reader.gpu.gate.clear()
    reader.transport.submit(peer, span(0, reader.into.memory.address, MIB))
    mortal.kill()
    reader.gpu.gate.set()
    completion = ended(reader.transport)
    assert (completion.status, completion.error) == (ReadStatus.FAILED, "the peer's process has ended")


def test_an_idle_peers_death_is_seen_and_its_memory_unmapped(reader: Reader, mortal: SpawnedTarget) -> None:
    peer = reader.transport.connect(mortal.address)
    assert reader.gpu.mapped
    mortal.kill()
    assert select.select([reader.transport.fileno()], [], [], 30)[0]
    assert reader.transport.poll() == []
    reader.transport._peers[peer].join()
    assert not reader.gpu.mapped
    assert not select.select([reader.transport.fileno()], [], [], 0)[0]
    reader.transport.close_peer(peer)


def test_a_life_is_told_from_a_later_one_of_the_same_number() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        home = ProcessHome.of(child.pid)
        life, other = Life(home), Life(msgspec.structs.replace(home, started=home.started - 1))
        assert not life.has_ended
        assert other.has_ended
        child.kill()
        child.wait()
        assert life.has_ended
        assert Life(home).has_ended
        life.close()
