"""Random batches over arena-like rows on the GPU, the same for all decode operations."""

from dataclasses import dataclass
from functools import reduce
from operator import mul

import torch
from pdkv_kernels.paged import BLOCK, PagedKv
from torch import Tensor

PITCH_TP4 = 2_961_408
"""Bytes of one page's row: all layers of M3 at TP4 with fp8 K/V, scales and fp8 index keys."""
_memory_bytes = 48 << 30
"""Rows are made shorter than ``PITCH_TP4`` where all pages would not fit into this. Only ``shrink`` changes it."""


def shrink() -> None:
    """Make all rows from now on as short as they can be; for the rest of the process."""
    global _memory_bytes  # noqa: PLW0603
    _memory_bytes = 0


@dataclass(frozen=True)
class Shape:
    """A decode batch of M3: every sequence has the same context, the newest ``query_len`` tokens included."""

    tp: int  # 1: 4 kv heads, 64 query heads; 4: 1 and 16
    batch: int
    context: int  # tokens
    fp8: bool
    query_len: int = 1

    @property
    def kv_heads(self) -> int:
        return 4 // self.tp

    @property
    def blocks(self) -> int:
        return -(-self.context // BLOCK)

    @property
    def name(self) -> str:
        context = f"{self.context >> 10}k" if self.context >= 1024 else str(self.context)
        kind = "fp8" if self.fp8 else "bf16"
        return f"TP{self.tp} B={self.batch} {context} {kind}" + (f" q={self.query_len}" if self.query_len > 1 else "")


class Rows:
    """Memory of ``num_pages`` rows, filled with random bytes that are finite numbers in bf16 and in e4m3.

    It owns the memory; the views that it cuts out keep the memory alive.
    """

    def __init__(self, num_pages: int, row_bytes: int) -> None:
        most = max(_memory_bytes // num_pages, row_bytes)
        self.pitch = -(-max(row_bytes, min(PITCH_TP4, most)) // 512) * 512
        self.num_pages = num_pages
        self._memory = torch.empty(num_pages * self.pitch, dtype=torch.uint8, device="cuda")
        words = self._memory.view(torch.int32)
        for part in words.split(1 << 28):
            # 0xBF clears the highest bit of the exponent of an e4m3 number, and in the upper byte that of a bf16.
            part.random_(-(1 << 31), (1 << 31) - 1).bitwise_and_(0xBFBFBFBF - (1 << 32))
        self._next = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next piece of every row as [num_pages, *shape], contiguous inside a row."""
        num_bytes = reduce(mul, shape) * dtype.itemsize
        flat = self._memory.view(self.num_pages, self.pitch)[:, self._next : self._next + num_bytes]
        self._next += num_bytes
        assert self._next <= self.pitch, "the row is full"
        strides = [1]
        for size in reversed(shape[1:]):
            strides.insert(0, strides[0] * size)
        typed = flat.view(dtype)
        return typed.as_strided((self.num_pages, *shape), (typed.stride(0), *strides), typed.storage_offset())


def shuffled_table(batch: int, blocks: int) -> Tensor:
    """int32 [batch, blocks]: every block has a page of its own, and pages lie in disorder."""
    return torch.randperm(batch * blocks, device="cuda", dtype=torch.int32).view(batch, blocks)


def kv_layer(memory: Rows, kv_heads: int, dim: int, fp8: bool) -> PagedKv:
    """K, V and scales of one layer as [pages, kv_heads, BLOCK, ...]; in a row, all of a head lie together."""
    if not fp8:
        both = memory.take((kv_heads, 2, BLOCK, dim), torch.bfloat16)
        return PagedKv(both[:, :, 0], both[:, :, 1])
    size = BLOCK * dim
    heads = memory.take((kv_heads, 2 * size + 2 * BLOCK * 4), torch.float8_e4m3fn)
    k = heads[..., :size].unflatten(2, (BLOCK, dim))
    v = heads[..., size : 2 * size].unflatten(2, (BLOCK, dim))
    scales = heads[..., 2 * size :].view(torch.float32)
    scales.uniform_(0.01, 0.02)
    return PagedKv(k, v, scales[..., :BLOCK], scales[..., BLOCK:])
