"""The gather kernel's source, run on the host: every alignment and odd length arrives, and nothing around it."""

import numpy as np
import pytest

from .host_gpu import gather_on_host


@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (3, 64), (7, 512)])
def test_copies_every_alignment_and_length(blocks: int, threads: int) -> None:
    random = np.random.default_rng(blocks)
    lengths = np.concatenate([np.arange(1, 70), random.integers(1, 9000, 400), [512, 2048, 16384, 16383, 32769]])
    count, pitch = lengths.size, 40_000
    source = random.integers(0, 256, count * pitch, dtype=np.uint8)
    target = np.full(count * pitch, 0xEE, dtype=np.uint8)
    sources = random.permutation(count) * pitch + random.integers(0, 64, count)
    targets = random.permutation(count) * pitch + random.integers(0, 64, count)
    expected = target.copy()
    for to, start, length in zip(targets, sources, lengths, strict=True):
        expected[to : to + length] = source[start : start + length]
    spans = np.concatenate([targets + target.ctypes.data, sources + source.ctypes.data, lengths]).astype(np.int64)
    gather_on_host()(spans.ctypes.data, count, blocks, threads)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("apart", [0, 1, 2, 4, 8, 16, 24])
def test_ends_that_lie_apart_by_any_power_of_two(apart: int) -> None:
    source = np.random.default_rng(apart).integers(0, 256, 5000, dtype=np.uint8)
    target = np.zeros(5100, dtype=np.uint8)
    shift = (source.ctypes.data - target.ctypes.data) % 16 + apart
    spans = np.array([target.ctypes.data + shift, source.ctypes.data, 4777], dtype=np.int64)
    gather_on_host()(spans.ctypes.data, 1, 1, 32)
    assert np.array_equal(target[shift : shift + 4777], source[:4777])
    assert not target[:shift].any()
    assert not target[shift + 4777 :].any()
