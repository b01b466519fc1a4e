"""Prefill chunks of M3 over arena-like rows on the GPU: what all prefill operations are measured with."""

from dataclasses import dataclass

import torch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from torch import Tensor

from benchmarks.arena_case import Rows

DIM = 128
TOPK = 16
WINDOW = 64
"""Neighbouring rows that choose alike where a shape says so ..."""
ALIKE = 13
"""... so many of their TOPK blocks, their newest one among them."""


@dataclass(frozen=True)
class Chunk:
    """The last ``rows`` tokens of a context of ``context`` tokens, one sequence."""

    tp: int  # 1: 4 kv heads, 64 query heads; 4: 1 and 16
    rows: int
    context: int
    kind: str  # bf16; fp8, with scales for each token and head; fp8u, without scales
    windows: bool = False

    @property
    def kv_heads(self) -> int:
        return 4 // self.tp

    @property
    def blocks(self) -> int:
        return -(-self.context // BLOCK)

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.kind == "bf16" else torch.float8_e4m3fn

    @property
    def name(self) -> str:
        how = " windows" if self.windows else ""
        return f"TP{self.tp} {self.rows >> 10}k at {self.context >> 10}k {self.kind}{how}"

    def queries(self) -> RaggedQueries:
        """Every block has a page of its own, and pages lie in disorder."""
        starts = torch.tensor([0, self.rows], dtype=torch.int32, device="cuda")
        contexts = torch.tensor([self.context - self.rows], dtype=torch.int32, device="cuda")
        return RaggedQueries(starts, contexts, torch.randperm(self.blocks, device="cuda").int()[None])

    def positions(self) -> Tensor:
        """int64 [rows]."""
        return torch.arange(self.context - self.rows, self.context, device="cuda")

    def choices(self) -> Tensor:
        """Random visible blocks, the newest among them: int32 [rows, kv_heads, TOPK], -1 behind the last."""
        newest = (self.positions() // BLOCK)[:, None, None]
        block = torch.arange(self.blocks, device="cuda")
        rank = torch.rand(self.rows, self.kv_heads, self.blocks, device="cuda")
        if self.windows:
            some = torch.rand(-(-self.rows // WINDOW), self.kv_heads, self.blocks, device="cuda")
            some = some.masked_fill(block >= newest[::WINDOW], -1.0)  # seen by every row of the window
            best = some.topk(min(ALIKE - 1, self.blocks), dim=-1)
            bonus = torch.zeros_like(some).scatter_(2, best.indices, (best.values > 0).float())
            rank += bonus.repeat_interleave(WINDOW, 0)[: self.rows]
        rank = torch.where(block == newest, 9.0, rank).masked_fill_(block > newest, -1.0)
        best = rank.topk(min(TOPK, self.blocks), dim=-1)
        chosen = torch.where(best.values < 0, -1, best.indices).int()
        return torch.nn.functional.pad(chosen, (0, TOPK - chosen.shape[-1]), value=-1).contiguous()

    def kv(self) -> tuple[PagedKv, int]:
        """Random K and V of one layer, and the distance between rows in bytes."""
        size = BLOCK * DIM
        heads = self.kv_heads
        if self.kind == "bf16":
            rows = Rows(self.blocks, 60 * heads * 4 * size)
            both = rows.take((heads, 2, BLOCK, DIM), torch.bfloat16)
            return PagedKv(both[:, :, 0], both[:, :, 1]), rows.pitch
        rows = Rows(self.blocks, 60 * heads * (2 * size + 8 * BLOCK))
        head = rows.take((heads, 2 * size + 8 * BLOCK), torch.float8_e4m3fn)
        k = head[..., :size].unflatten(2, (BLOCK, DIM))
        v = head[..., size : 2 * size].unflatten(2, (BLOCK, DIM))
        if self.kind == "fp8u":
            return PagedKv(k, v), rows.pitch
        scales = head[..., 2 * size :].view(torch.float32)
        scales.uniform_(0.5, 2.0)
        return PagedKv(k, v, scales[..., :BLOCK], scales[..., BLOCK:]), rows.pitch
