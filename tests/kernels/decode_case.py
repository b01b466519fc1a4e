"""Decode batches over strided, shuffled, poisoned pages in any dtype and on any device."""

from dataclasses import dataclass

import pytest
import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from torch import Tensor

HAS_CUDA = torch.cuda.is_available()
FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz)


def on(device: str, dtype: torch.dtype, *more: object):
    """A test parameter (device, dtype, ...): on the CPU the kernels run in Triton's interpreter."""
    marks = [pytest.mark.gpu, pytest.mark.skipif(not HAS_CUDA, reason="needs an NVIDIA GPU")]
    if device == "cpu":
        marks = [pytest.mark.skipif(HAS_CUDA, reason="Triton compiles for the GPU at hand; the interpreter is off")]
    name = "-".join([device, str(dtype).removeprefix("torch."), *(str(m).removeprefix("torch.") for m in more)])
    return pytest.param(device, dtype, *more, marks=marks, id=name)


@dataclass(frozen=True)
class DecodeCase:
    batch: DecodeBatch
    kv: PagedKv
    index_k: Tensor  # [num_pages, BLOCK, dim]
    q: Tensor  # [num_rows, num_heads, dim]
    index_q: Tensor  # [num_rows, kv_heads, dim]

    def ragged(self) -> RaggedQueries:
        """The same rows as the references take them, on the CPU; padded sequences have rows that see nothing there,
        so they must be left out of a comparison."""
        seq_lens, step = self.batch.seq_lens.cpu(), self.batch.query_len
        starts = torch.arange(seq_lens.numel() + 1, dtype=torch.int32) * step
        return RaggedQueries(starts, seq_lens - step, self.batch.page_table.cpu())

    def live_rows(self) -> list[tuple[int, int, int]]:
        """(row, sequence, position) of every row of a sequence that is not padding."""
        step = self.batch.query_len
        lens = self.batch.seq_lens.tolist()
        rows = [(s * step + i, s, n - step + i) for s, n in enumerate(lens) for i in range(step)]
        return [(row, seq, position) for row, seq, position in rows if position >= 0]


def make_decode(
    device: str,
    dtype: torch.dtype,
    seq_lens: list[int],
    *,
    query_len: int = 1,
    heads: tuple[int, int] = (8, 4),
    dim: int = 16,
    spare_blocks: int = 1,
    seed: int = 0,
) -> DecodeCase:
    """Sequences of these lengths, ``heads`` query and kv heads. fp8 K/V have scales that differ wildly by token.

    Rows are cut as an arena's are: index keys first, then head by head K, V and scales, then a gap. All memory but
    the sequences' own tokens is NaN in every format, unused rows of last pages and foreign pages included.
    """
    generator = torch.Generator().manual_seed(seed)
    num_heads, kv_heads = heads
    blocks = [-(-n // BLOCK) for n in seq_lens]
    num_pages = sum(blocks) + 3
    tile = BLOCK * dim * dtype.itemsize
    scale_bytes = BLOCK * 4 if dtype in FP8 else 0
    head_bytes = 2 * tile + 2 * scale_bytes
    memory = _poison(num_pages, tile + kv_heads * head_bytes + 512, dtype)
    index_k = memory[:, :tile].view(dtype).unflatten(1, (BLOCK, dim))
    by_head = memory[:, tile : tile + kv_heads * head_bytes].unflatten(1, (kv_heads, head_bytes))
    k = by_head[..., :tile].view(dtype).unflatten(2, (BLOCK, dim))
    v = by_head[..., tile : 2 * tile].view(dtype).unflatten(2, (BLOCK, dim))
    scales = by_head[..., 2 * tile :].view(torch.float32) if scale_bytes else None
    order = torch.randperm(num_pages, generator=generator)
    table = torch.full((len(seq_lens), max(blocks, default=0) + spare_blocks), -1, dtype=torch.int32)
    taken = 0
    for seq, count in enumerate(blocks):
        pages = order[taken : taken + count]
        taken += count
        table[seq, :count] = pages.int()
        rows = torch.arange(seq_lens[seq])
        page, offset = pages[rows // BLOCK], rows % BLOCK
        index_k.view(_bits(dtype))[page, offset] = _random((rows.numel(), dim), dtype, generator)
        for pages_view in (k, v):
            fresh = _random((rows.numel(), kv_heads, dim), dtype, generator)
            pages_view.view(_bits(dtype))[page, :, offset] = fresh
        if scales is not None:
            exponents = torch.randint(-7, 3, (rows.numel(), kv_heads, 2), generator=generator).float()
            scales.unflatten(2, (2, BLOCK)).permute(0, 3, 1, 2)[page, offset] = exponents.exp2()
    moved = memory.to(device)

    def there(view: Tensor) -> Tensor:
        base = moved.flatten().view(view.dtype)
        return base.as_strided(view.shape, view.stride(), view.storage_offset())

    num_rows = len(seq_lens) * query_len
    kind = torch.float32 if device == "cpu" else torch.bfloat16
    q = (torch.randn(num_rows, num_heads, dim, generator=generator) * 2.0).to(kind)
    index_q = torch.randn(num_rows, kv_heads, dim, generator=generator)
    # The engine hands the indexer its query in the dtype of the index cache.
    index_q = index_q.to(dtype) if device != "cpu" or dtype in FP8 else index_q.to(kind)
    k_scale = v_scale = None
    if scales is not None:
        k_scale, v_scale = there(scales[..., :BLOCK]), there(scales[..., BLOCK:])
    return DecodeCase(
        DecodeBatch(torch.tensor(seq_lens, dtype=torch.int32, device=device), table.to(device), query_len),
        PagedKv(there(k), there(v), k_scale, v_scale),
        there(index_k),
        q.to(device),
        index_q.to(device),
    )


def cpu(kv: PagedKv) -> PagedKv:
    """The same pages for a reference on the CPU."""
    return PagedKv(*(None if t is None else t.cpu() for t in (kv.k, kv.v, kv.k_scale, kv.v_scale)))


def _poison(num_pages: int, row_bytes: int, dtype: torch.dtype) -> Tensor:
    """Bytes that are NaN in this dtype and, in fp8, as float32 scales too: uint8 [num_pages, pitch]."""
    pitch = -(-row_bytes // 512) * 512
    fill = 0x80 if dtype in (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz) else 0xFF
    return torch.full((num_pages, pitch), fill, dtype=torch.uint8)


def _bits(dtype: torch.dtype) -> torch.dtype:
    """Integers of the same width, for formats that cannot be indexed."""
    return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[dtype.itemsize]


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers rounded to dtype, as bits."""
    return torch.randn(shape, generator=generator).to(dtype).view(_bits(dtype))
