"""Memory of GPUs as a ground: every contestant allocates its own pair, which the race opens, fills and compares."""

import itertools

import numpy as np
import torch

from pdkv.bench.ground import PATTERN, PATTERN_SHIFT, POISON, Ground, Judge
from pdkv.bench.memories import GpuPlace, Memory, close_handle, open_handle
from pdkv.bench.mover import SpanTable

_WORDS_AT_ONCE = 1 << 25
"""Of 8 bytes; comparing takes some ten times as much memory."""

_WORDS_TO_WAKE = 1 << 17
"""1 MiB: 64 KiB wake every link of two H200, 4 KiB do not."""

_SIGNED = PATTERN - (1 << 64)
_MASK = (1 << (64 - PATTERN_SHIFT)) - 1


class GpuGround(Ground):
    """A memory cannot be exported again by a process that only opened it, so it cannot be one pair for all."""

    prefix = "gpu-"

    def __init__(self, source_gpu: int, reader_gpu: int, num_bytes: int) -> None:
        self._gpus, self._num_bytes = (source_gpu, reader_gpu), num_bytes
        self.source, self.reader = (GpuPlace(gpu, num_bytes) for gpu in self._gpus)

    def judge(self, source_handle: bytes, reader_handle: bytes) -> Judge:
        opened = zip((source_handle, reader_handle), self._gpus, strict=True)
        return GpuJudge(*(open_handle(handle, gpu, self._num_bytes) for handle, gpu in opened))


class GpuJudge(Judge):
    """Compares on the reader's GPU with what the source was filled with, whatever the source holds by now."""

    def __init__(self, source: Memory, reader: Memory) -> None:
        self._memories = (source, reader)
        self._reader = words_of(reader)
        words = words_of(source)
        fill(words)
        torch.cuda.synchronize(source.gpu)
        self._first = words[:_WORDS_TO_WAKE]
        self._scratch = torch.empty_like(self._first, device=reader.device)

    def poison(self) -> None:
        self._reader.view(torch.uint8).fill_(POISON)
        torch.cuda.synchronize(self._reader.device)

    def wake(self) -> None:
        """An NVLink that nothing has used for 50 ms sleeps, and its next user waits 0.2 ms for it: comparing takes less
        than that for some contestants, and more for others."""
        self._scratch.copy_(self._first)
        for memory in self._memories:
            torch.cuda.synchronize(memory.gpu)

    def num_wrong(self, spans: SpanTable) -> int:
        return num_wrong(self._reader, spans)

    def close(self) -> None:
        for memory in self._memories:
            close_handle(memory)


class _Words:
    """A GPU's memory for torch to view."""

    def __init__(self, memory: Memory) -> None:
        self.__cuda_array_interface__ = {
            "shape": (memory.num_bytes // 8,),
            "typestr": "<i8",
            "data": (memory.address, False),
            "strides": None,
            "version": 3,
        }


def words_of(memory: Memory) -> torch.Tensor:  # [num_bytes / 8] int64
    return torch.as_tensor(_Words(memory), device=memory.device)


def pattern(numbers: torch.Tensor) -> torch.Tensor:  # [n] int64 -> [n] int64
    """The words of a source that have these numbers, as ``HostJudge.fill`` writes them."""
    mixed = numbers * _SIGNED
    return mixed ^ ((mixed >> PATTERN_SHIFT) & _MASK)


def fill(words: torch.Tensor) -> None:  # [n] int64
    for start in range(0, words.numel(), _WORDS_AT_ONCE):
        end = min(start + _WORDS_AT_ONCE, words.numel())
        words[start:end] = pattern(torch.arange(start, end, device=words.device))


def num_wrong(words: torch.Tensor, spans: SpanTable) -> int:  # [n] int64
    """Spans, in whole words, of a reader's memory that are not what their source was filled with. A span that is too
    long to be compared at once counts for each of its pieces."""
    assert not (spans % 8).any(), "rows and tensors are multiples of 8 bytes"
    table = _cut(spans // 8)
    groups = np.cumsum(table[2]) // _WORDS_AT_ONCE
    edges = [*np.flatnonzero(np.diff(groups, prepend=-1)), groups.size]
    on_device = torch.from_numpy(table).to(words.device)
    return sum(_num_wrong(words, on_device[:, start:end]) for start, end in itertools.pairwise(edges))


def _cut(table: SpanTable) -> SpanTable:
    """The same words in spans that are short enough to be compared at once."""
    pieces = -(-table[2] // _WORDS_AT_ONCE)
    which = np.repeat(np.arange(pieces.size), pieces)
    number = np.arange(which.size) - (np.cumsum(pieces) - pieces)[which]
    remote, local, length = table[:, which]
    skipped = number * _WORDS_AT_ONCE
    return np.stack([remote + skipped, local + skipped, np.minimum(length - skipped, _WORDS_AT_ONCE)])


def _num_wrong(words: torch.Tensor, table: torch.Tensor) -> int:  # [n] int64, [3, spans] int64
    remote, local, length = table
    ends = length.cumsum(0)
    total = int(ends[-1])
    span = torch.repeat_interleave(torch.arange(length.numel(), device=words.device), length, output_size=total)
    within = torch.arange(total, device=words.device) - (ends - length)[span]
    differs = words[local[span] + within] != pattern(remote[span] + within)
    return int(torch.unique_consecutive(span[differs]).numel())
