"""Attention of a prefill chunk to all keys before it, in one dense layer."""

from collections.abc import Iterator

import torch
from pdkv_kernels.paged import PagedKv, RaggedQueries
from pdkv_kernels.paged_attention_gathered import paged_attention_gathered
from pdkv_kernels.paged_attention_prefill import paged_attention_prefill
from torch import Tensor

from benchmarks.prefill_case import DIM, Chunk
from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work

TESTS = ("tests/kernels/test_paged_attention_prefill_triton.py",)

K = 1024
_PLACES = [(8 * K, 8 * K), (2 * K, 32 * K), (8 * K, 64 * K)]
SHAPES = [Chunk(tp, *at, kind) for tp in (4, 1) for kind in ("bf16", "fp8") for at in _PLACES[: 3 if tp == 4 else 2]]
SCALE = DIM**-0.5


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Products count for keys that a row sees. vLLM has no kernel of its own for these layers."""
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape)
            torch.cuda.empty_cache()


def _work(shape: Chunk) -> Work:
    kv, pitch = shape.kv()
    queries = shape.queries()
    q = torch.randn(shape.rows, 16 * shape.kv_heads, DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
    token_bytes = 2 * DIM * kv.k.element_size() + (8 if kv.k_scale is not None else 0)
    return Work(
        shape=shape.name,
        calls=[lambda: paged_attention_prefill(q, kv, queries, SCALE, out)],
        num_bytes=2 * q.nbytes + shape.kv_heads * shape.context * token_bytes,
        num_flops=int((shape.positions() + 1).sum()) * 16 * shape.kv_heads * DIM * 4,
        ceiling="bf16",
        note=f"row {pitch} B; pages gathered for torch {_gathered_us(q, kv, queries):.0f} us",
    )


def _gathered_us(q: Tensor, kv: PagedKv, queries: RaggedQueries) -> float:
    """Torch's fused attention over pages put together in q's dtype, without graphs: it asks the host for lengths."""
    paged_attention_gathered(q, kv, queries, SCALE)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    marks[0].record()
    for _ in range(3):
        paged_attention_gathered(q, kv, queries, SCALE)
    marks[1].record()
    marks[1].synchronize()
    return marks[0].elapsed_time(marks[1]) / 3 * 1e3
