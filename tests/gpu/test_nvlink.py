"""The nvlink transport on GPUs: the conformance kit over device memory, and what a peer's death leaves behind."""

import os
import select
import signal

import numpy as np
import pytest
import torch

from pdkv.schema import ReadBatch
from pdkv.transport.base import Completion, PeerId, ReadStatus, Transport
from pdkv.transport.conformance import check_names, run_check
from pdkv.transport.conformance_target import SpawnedTarget, TransportSpec, pattern
from pdkv.transport.nvlink import NvlinkTransport

from . import memory
from .memory import GIB

HERE = __name__
MEMORY = f"{memory.__name__}:GpuMemory"
HUGE = f"{memory.__name__}:make_huge"


def make(argument: str) -> Transport:
    """Factory: the argument is from how many bytes on spans go to the copy engines; empty = the default."""
    return NvlinkTransport(row_bytes=int(argument)) if argument else NvlinkTransport()


SPEC = TransportSpec(f"{HERE}:make", path="cuda_ipc", memory=MEMORY)
ON_ANOTHER = TransportSpec(f"{HERE}:make", path="cuda_ipc", memory=MEMORY, prefix=("env", "CUDA_VISIBLE_DEVICES=1"))
READS = ("reads_every_byte", "reads_scattered_odd_spans", "reads_spans_of_tens_of_mb")

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")


@pytest.mark.parametrize("name", check_names(SPEC))
def test_conforms_on_one_gpu(name: str) -> None:
    run_check(SPEC, name)


@pytest.mark.multi_gpu(2)
@two_gpus
@pytest.mark.parametrize("name", check_names(ON_ANOTHER))
def test_conforms_across_gpus(name: str) -> None:
    run_check(ON_ANOTHER, name)


@pytest.mark.multi_gpu(2)
@two_gpus
def test_reads_into_a_second_gpu_while_another_is_current() -> None:
    """The reader's GPU is that of its memory, whichever its thread works on, and stays so."""
    reader, into = NvlinkTransport(row_bytes=4096), memory.GpuMemory(1 << 20, gpu=1)
    target = SpawnedTarget(SPEC, 1)
    try:
        memory.driver(0)
        reader.register(into.memory)
        peer = reader.connect(target.address)
        starts, lengths = np.array([0, 4000]), np.array([4000, (1 << 20) - 4000])
        zeros = np.zeros(2, dtype=np.int64)
        batch = ReadBatch(memory=zeros, remote=starts, local=starts + into.memory.address, length=lengths)
        assert _read(reader, peer, batch).status is ReadStatus.OK
        assert np.array_equal(into.bytes, pattern(1, 0)[: 1 << 20])
    finally:
        reader.close()
        target.close()


@pytest.mark.parametrize("row_bytes", ["1", str(1 << 40)], ids=["copies", "kernel"])
@pytest.mark.parametrize("name", READS)
def test_each_half_alone_reads_everything(name: str, row_bytes: str) -> None:
    run_check(TransportSpec(f"{HERE}:make", row_bytes, path="cuda_ipc", memory=MEMORY), name)


def test_a_peer_that_dies_amid_reads_takes_nothing_down() -> None:
    """Reads follow one another until one fails: those before have the right bytes, also while the process is being
    taken down. The GPU goes on working, and its memory is free again although it was mapped here."""
    size, known = 4 * GIB, pattern(1, 0)
    before = memory.free_bytes()
    spec = TransportSpec(f"{HERE}:make", path="cuda_ipc", memory=HUGE)
    reader, into = NvlinkTransport(), memory.GpuMemory(size)
    reader.register(into.memory)
    target = SpawnedTarget(spec, 1)
    try:
        peer = reader.connect(target.address)
        one = np.array([0], dtype=np.int64)
        batch = ReadBatch(memory=one, remote=one, local=one + into.memory.address, length=one + size)
        assert _read(reader, peer, batch).status is ReadStatus.OK
        os.kill(target._process.pid, signal.SIGKILL)  # not waited for: its end takes the driver a while
        for _ in range(100_000):  # minutes
            into.fill(0xEE)
            completion = _read(reader, peer, batch)
            if completion.status is not ReadStatus.OK:
                break
            assert np.array_equal(into.look(0, known.size), known), "a good read of a dying peer brought other bytes"
        assert (completion.status, completion.error) == (ReadStatus.FAILED, "the peer's process has ended")
        assert _read(reader, peer, batch).status is ReadStatus.FAILED
        into.fill(7)  # the context is sound
        assert bool((into.look(0, 1000) == 7).all())
    finally:
        target.kill()
        reader.close()
    del into
    held = before - memory.free_bytes()
    assert held < GIB, f"{held:,} bytes are still held"


def test_an_idle_peers_death_gives_its_memory_back() -> None:
    """Nobody reads, so only the process's end can tell: otherwise a worker that starts again finds no room."""
    spec = TransportSpec(f"{HERE}:make", path="cuda_ipc", memory=HUGE)
    reader, into = NvlinkTransport(), memory.GpuMemory(1 << 20)
    reader.register(into.memory)
    target = SpawnedTarget(spec, 1)
    try:
        reader.connect(target.address)
        held = memory.free_bytes()
        target.kill()
        assert select.select([reader.fileno()], [], [], 30)[0], "the end of the peer's process is not seen"
        assert reader.poll() == []
        (known,) = reader._peers.values()
        known.join()
        freed = memory.free_bytes() - held
        assert freed > 7 * GIB, f"{freed:,} bytes became free"
    finally:
        reader.close()


def _read(reader: Transport, peer: PeerId, batch: ReadBatch) -> Completion:
    reader.submit(peer, batch)
    ends: list[Completion] = []
    while not ends:
        assert select.select([reader.fileno()], [], [], 60)[0], "nothing completes"
        ends = reader.poll()
    (end,) = ends
    return end
