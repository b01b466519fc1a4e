"""Norm, rope, rounding and insertion of a step's rows in one sparse layer."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from pdkv_kernels.kv_store import kv_store
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, TokenRows, kv_store_ref
from pdkv_kernels.paged import BLOCK, LayerPages, PagedKv
from pdkv_kernels.rope_ref import rope_table_ref

from benchmarks.arena_case import Rows
from benchmarks.prefill_case import DIM
from benchmarks.registry import Question, wanted
from benchmarks.timing import Goal, Rates, Work, rotations

TESTS = ("tests/kernels/test_kv_store_triton.py",)


@dataclass(frozen=True)
class Shape:
    tp: int
    rows: int
    fp8: bool  # K, V with scales and index keys in e4m3; else all in bfloat16

    @property
    def name(self) -> str:
        return f"TP{self.tp} {self.rows} rows {'fp8' if self.fp8 else 'bf16'}"


SHAPES = [Shape(tp, rows, fp8) for tp in (1, 4) for fp8 in (False, True) for rows in (64, 1024, 4096, 8192)]


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: the projection and rope table once, queries, K, V, scales and index keys once.

    vLLM's fused operation is compiled C++; the comparison here is the same work as a sequence of torch operations.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape, question.rival)
            torch.cuda.empty_cache()


def _work(shape: Shape, with_rival: bool) -> Work:
    kv_heads = 4 // shape.tp
    heads = PackedHeads(16 * kv_heads, kv_heads, kv_heads)
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    size, scale_bytes = BLOCK * DIM * dtype.itemsize, 8 * BLOCK if shape.fp8 else 0
    head_bytes = 2 * size + scale_bytes
    memory = Rows(-(-shape.rows // BLOCK), 60 * kv_heads * head_bytes)
    index_k = memory.take((BLOCK, DIM), dtype)
    block = memory.take((kv_heads, head_bytes), torch.uint8)
    k, v = (block[..., i * size : (i + 1) * size].view(dtype).unflatten(2, (BLOCK, DIM)) for i in range(2))
    scales = block[..., 2 * size :].view(torch.float32) if shape.fp8 else None
    kv = PagedKv(k, v) if scales is None else PagedKv(k, v, scales[..., :BLOCK], scales[..., BLOCK:])
    pages = LayerPages(kv, index_k)
    norms = HeadNorms(*(torch.randn(DIM, device="cuda").bfloat16() for _ in range(4)), eps=1e-6)
    slots = torch.arange(shape.rows, device="cuda")
    rows = TokenRows(slots, *rope_table_ref(slots, 64, 5e6))
    one = shape.rows * heads.total * DIM * 2
    packed = [torch.randn(shape.rows, heads.total, DIM, device="cuda").bfloat16() for _ in range(rotations(2 * one))]
    outs = [kv_store(x, heads, norms, rows, pages) for x in packed]
    first = outs[0]
    assert first.index_q is not None
    stored = shape.rows * (2 * kv_heads + 1) * DIM * dtype.itemsize + shape.rows * 8 * kv_heads * int(shape.fp8)
    num_bytes = one + first.q.nbytes + first.index_q.nbytes + stored + rows.cos.nbytes * 2 + slots.nbytes
    note = "" if not with_rival else f"torch in sequence {_torch_us(packed[0], heads, norms, rows, pages):.0f} us"
    return Work(
        shape=shape.name,
        calls=[
            lambda x=x, out=out: kv_store(x, heads, norms, rows, pages, out)
            for x, out in zip(packed, outs, strict=True)
        ],
        num_bytes=num_bytes,
        ceiling="copy",
        note=note,
        goal=Goal(share=0.75) if shape.rows == 4096 else None,
    )


def _torch_us(packed: torch.Tensor, heads: PackedHeads, norms: HeadNorms, rows: TokenRows, pages: LayerPages) -> float:
    """The reference, which is a sequence of torch operations, without graphs: it asks the host for its shapes."""
    kv_store_ref(packed, heads, norms, rows, pages)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    for _ in range(5):
        kv_store_ref(packed, heads, norms, rows, pages)
    marks[1].record()
    marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / 5 * 1e3
