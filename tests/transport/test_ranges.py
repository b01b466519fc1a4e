"""Ranges are refused by the same rules however many memories there are."""

import numpy as np
import pytest

from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch
from pdkv.transport.ranges import fault_of

SIZE, BASE = 1000, 1 << 40
MOST = (1 << 63) - 1
THEIRS, OURS = MemoryDescriptor(0, SIZE, b""), LocalMemory(BASE, 2 * SIZE)
ELSEWHERE = LocalMemory(1 << 50, 1)

GOOD = [(0, 0, 0, SIZE), (0, 0, SIZE, SIZE), (0, SIZE - 1, 2 * SIZE - 1, 1), (0, 500, 10, 500)]
BAD = [
    (1, 0, 0, 8),
    (-1, 0, 0, 8),
    (0, -1, 0, 8),
    (0, SIZE, 0, 1),
    (0, SIZE - 7, 0, 8),
    (0, MOST, 0, 8),
    (0, 0, 0, 0),
    (0, 8, 0, -8),
    (0, 8, 0, MOST),
    (0, 0, -1, 8),
    (0, 0, 2 * SIZE - 7, 8),
    (0, 0, MOST - BASE, 8),
    (0, 0, -BASE, 8),
]


def batch(*spans: tuple[int, int, int, int]) -> ReadBatch:
    memory, remote, offset, length = (np.array(column, dtype=np.int64) for column in zip(*spans, strict=True))
    return ReadBatch(memory, remote, offset + BASE, length)


@pytest.mark.parametrize("ours", [[OURS], [ELSEWHERE, OURS]], ids=["one", "two"])
class TestOursAreOneOrTwo:
    def test_takes_what_fits(self, ours: list[LocalMemory]) -> None:
        assert not fault_of(batch(*GOOD), [THEIRS], ours)
        for span in GOOD:
            assert not fault_of(batch(span), [THEIRS], ours)

    @pytest.mark.parametrize("span", BAD)
    def test_refuses_what_does_not(self, ours: list[LocalMemory], span: tuple[int, int, int, int]) -> None:
        assert fault_of(batch(span), [THEIRS], ours)
        for place in range(len(GOOD) + 1):
            assert fault_of(batch(*GOOD[:place], span, *GOOD[place:]), [THEIRS], ours)
