"""Where contestants move bytes, and who judges them: sources are filled and readers compared outside of any of them."""

import os
from abc import ABC, abstractmethod

import numpy as np

from pdkv.bench.memories import HostMemory, HostPlace, Place, map_memory
from pdkv.bench.mover import SpanTable

POISON = 0xEE

PATTERN = 0x9E3779B97F4A7C15
"""Word n of a source is n x this, mixed with its own high bits: one to one, so that no two words are equal."""
PATTERN_SHIFT = 29


class Judge(ABC):
    """Of the two memories that one contestant moves between."""

    @abstractmethod
    def poison(self) -> None:
        """Overwrite the reader's memory."""

    @abstractmethod
    def wake(self) -> None:
        """Use the way between the two, so that every contestant finds it awake, however long judging the last took."""

    @abstractmethod
    def num_wrong(self, spans: SpanTable) -> int:
        """Spans that the reader does not have as the source has, or should have."""

    @abstractmethod
    def close(self) -> None: ...


class Ground(ABC):
    """The memories of one kind of path. Owned by the race."""

    source: Place
    reader: Place
    prefix: str = ""
    """In front of a contestant's name in ``MOVERS``."""

    def fds(self) -> tuple[int, ...]:
        """Descriptors that contestants inherit."""
        return ()

    @abstractmethod
    def judge(self, source_handle: bytes, reader_handle: bytes) -> Judge:
        """Of a contestant whose memories have these handles (``memories.handle_of``)."""


class HostGround(Ground):
    """Two memfds that all contestants map."""

    def __init__(self, num_bytes: int) -> None:
        self._fds = (_memfd("source", num_bytes), _memfd("reader", num_bytes))
        self.source, self.reader = (HostPlace(fd, num_bytes) for fd in self._fds)
        self._judge = HostJudge(*(map_memory(fd, num_bytes) for fd in self._fds))
        self._judge.fill()

    def fds(self) -> tuple[int, ...]:
        return self._fds

    def judge(self, source_handle: bytes, reader_handle: bytes) -> Judge:  # noqa: ARG002  all share these two
        return self._judge

    def close(self) -> None:
        for fd in self._fds:
            os.close(fd)


class HostJudge(Judge):
    def __init__(self, source: HostMemory, reader: HostMemory) -> None:
        self._source, self._reader = source, reader

    def fill(self) -> None:
        words = self._source.bytes[: self._source.num_bytes // 8 * 8].view(np.uint64)
        step = 1 << 20
        for start in range(0, words.size, step):  # in steps, for the sake of memory
            piece = np.arange(start, min(start + step, words.size), dtype=np.uint64) * np.uint64(PATTERN)
            words[start : start + step] = piece ^ (piece >> np.uint64(PATTERN_SHIFT))

    def poison(self) -> None:
        self._reader.bytes[:] = POISON

    def wake(self) -> None:
        """Nothing sleeps between two mappings."""

    def num_wrong(self, spans: SpanTable) -> int:
        source, reader = self._source.bytes, self._reader.bytes
        return sum(
            not np.array_equal(reader[local : local + length], source[remote : remote + length])
            for remote, local, length in spans.T.tolist()
        )

    def close(self) -> None:
        """Its memories are shared with all others, and go with the ground."""


def _memfd(name: str, num_bytes: int) -> int:
    fd = os.memfd_create(f"pdkv-bench-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    return fd
