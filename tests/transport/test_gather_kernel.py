"""The gather kernel's source, run on the host: every alignment and odd length arrives, and nothing around it."""

import numpy as np
import pytest

from .host_gpu import gather_on_host


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("blocks", "threads"), [(1, 32), (3, 64), (7, 512)])
def test_copies_every_alignment_and_length(blocks: int, threads: int, share: float) -> None:
    """Whatever part of them the host says are not short."""
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
    spans = np.stack([targets + target.ctypes.data, sources + source.ctypes.data, lengths], axis=1).astype(np.int64)
    gather_on_host()(spans.ctypes.data, int(share * count), count, blocks, threads)
    assert np.array_equal(target, expected)


@pytest.mark.parametrize("apart", [0, 1, 2, 4, 8, 16, 24])
def test_ends_that_lie_apart_by_any_power_of_two(apart: int) -> None:
    source = np.random.default_rng(apart).integers(0, 256, 5000, dtype=np.uint8)
    target = np.zeros(5100, dtype=np.uint8)
    shift = (source.ctypes.data - target.ctypes.data) % 16 + apart
    spans = np.array([target.ctypes.data + shift, source.ctypes.data, 4777], dtype=np.int64)
    gather_on_host()(spans.ctypes.data, 1, 1, 1, 32)
    assert np.array_equal(target[shift : shift + 4777], source[:4777])
    assert not target[:shift].any()
    assert not target[shift + 4777 :].any()


@pytest.mark.parametrize("first", [0, 1, 6, 1002])
@pytest.mark.parametrize("odd", [None, 2, 17, 1000])
def test_short_spans_that_go_together(first: int, odd: int | None) -> None:
    """As the scales of fp8 pages: 512 bytes or less, in whole words; longer ones, or of odd lengths, among them."""
    random = np.random.default_rng(first)
    lengths = random.integers(1, 33, 1003) * 16
    if odd is not None:
        lengths[odd % 3 :: 7] += odd
    starts = np.cumsum(lengths + 48) // 16 * 16
    source = random.integers(0, 256, int(starts[-1]) + 2000, dtype=np.uint8)
    target = np.full(source.size, 0xEE, dtype=np.uint8)
    expected = target.copy()
    for start, length in zip(starts, lengths, strict=True):
        expected[start : start + length] = source[start : start + length]
    addresses = (starts + target.ctypes.data, starts + source.ctypes.data, lengths)
    spans = np.stack(addresses, axis=1).astype(np.int64)
    gather_on_host()(spans.ctypes.data, first, lengths.size, 2, 96)
    assert np.array_equal(target, expected)
