"""Judges of moves: a wrong byte, or a right row in the wrong place, is seen; on GPUs by torch's arithmetic."""

import numpy as np
import pytest
import torch

from pdkv.bench import gpu_ground
from pdkv.bench.geometry import Spans, Workload, memory_bytes
from pdkv.bench.ground import HostGround, HostJudge
from pdkv.bench.memories import DriverError, GpuPlace, gpu_names, host_memory, take

WORKLOAD = Workload(128 * 6)


def memories():
    return [host_memory(np.zeros(memory_bytes(WORKLOAD), np.uint8)) for _ in range(2)]


def moved(source, reader, table):
    for remote, local, length in table.T.tolist():
        reader.bytes[local : local + length] = source.bytes[remote : remote + length]


def words(memory) -> torch.Tensor:
    return torch.from_numpy(memory.bytes.view(np.int64))


@pytest.fixture(params=["host", "gpu"])
def judged(request, monkeypatch):
    """A source that is filled, a reader, and who counts; the GPU's arithmetic runs on the CPU, in small pieces."""
    source, reader = memories()
    judge = HostJudge(source, reader)
    judge.fill()
    if request.param == "host":
        return source, reader, judge.num_wrong
    monkeypatch.setattr(gpu_ground, "_WORDS_AT_ONCE", 100_000)
    return source, reader, lambda table: gpu_ground.num_wrong(words(reader), table)


@pytest.mark.parametrize("layout", ["arena", "per-layer"])
def test_counts_the_spans_that_are_wrong(judged, layout):
    source, reader, num_wrong = judged
    table = Spans.of(WORKLOAD, layout).table()
    assert num_wrong(table) >= table.shape[1]
    moved(source, reader, table)
    assert num_wrong(table) == 0
    for where in (0, reader.num_bytes // 2, reader.num_bytes - 1):
        reader.bytes[where] ^= 1
        assert num_wrong(table) == 1
        reader.bytes[where] ^= 1


def test_a_row_in_the_place_of_another_is_wrong(judged):
    source, reader, num_wrong = judged
    table = Spans.of(WORKLOAD, "arena").table()
    swapped = table.copy()
    swapped[0, [1, 4]] = table[0, [4, 1]]
    moved(source, reader, swapped)
    assert num_wrong(swapped) == 0
    assert num_wrong(table) >= 2


def test_one_span_over_all_memory(judged):
    """As the ceiling on GPUs moves it, longer than what is compared at once."""
    source, reader, num_wrong = judged
    table = np.array([[0], [0], [source.num_bytes]])
    moved(source, reader, table)
    assert num_wrong(table) == 0
    reader.bytes[-1] ^= 1
    assert num_wrong(table) == 1


def test_both_kinds_fill_alike_and_no_two_words_are_equal(monkeypatch):
    monkeypatch.setattr(gpu_ground, "_WORDS_AT_ONCE", 1 << 16)
    host, other = memories()
    HostJudge(host, other).fill()
    gpu_ground.fill(words(other))
    assert np.array_equal(host.bytes, other.bytes)
    assert np.unique(host.bytes.view(np.uint64)).size == host.num_bytes // 8


def test_host_memories_are_shared_with_all_contestants():
    ground = HostGround(4096)
    try:
        judge = ground.judge(b"", b"")
        source, reader = take(ground.source), take(ground.reader)
        reader.bytes[:] = source.bytes
        whole = np.array([[0], [0], [4096]])
        assert judge.num_wrong(whole) == 0
        judge.poison()
        assert (reader.bytes == 0xEE).all()
        assert judge.num_wrong(whole) == 1
    finally:
        ground.close()


@pytest.mark.skipif(bool(gpu_names()), reason="there is a GPU")
def test_without_a_driver_a_gpu_is_refused_by_word():
    with pytest.raises(DriverError, match="no NVIDIA driver"):
        take(GpuPlace(0, 4096))
