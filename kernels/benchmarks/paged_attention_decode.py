"""Attention of one decode step to all keys, in one dense layer."""

from collections.abc import Iterator
from functools import partial

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.paged import BLOCK
from pdkv_kernels.paged_attention_decode import dense_plan, paged_attention_decode_into
from pdkv_kernels.softmax_merge import MergeWorkspace
from torch import Tensor
from torch.nn import functional

from benchmarks.arena_case import Rows, Shape, kv_layer, shuffled_table
from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work, rotations, time_calls

TESTS = "tests/kernels/test_paged_attention_decode_triton.py"

K = 1024
_BATCHES = [(1, 8 * K), (1, 128 * K), (8, 32 * K), (64, 8 * K), (256, 8 * K)]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(Shape(tp, 8, 32 * K, fp8, 4) for tp in (1, 4) for fp8 in (False, True)),
]
DIM = 128


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: K, V and scales of all keys once. vLLM has no Triton kernel of its own for M3's dense layers: in bf16 with
    one row a sequence, torch's fused attention over one contiguous copy of K and V stands beside ours."""
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape)
            torch.cuda.empty_cache()


def _work(shape: Shape) -> Work:
    rows, kv_heads = shape.batch * shape.query_len, shape.kv_heads
    token_bytes = 2 * DIM + 8 if shape.fp8 else 4 * DIM
    num_bytes = shape.batch * shape.context * kv_heads * token_bytes
    layers = rotations(num_bytes)
    memory = Rows(shape.batch * shape.blocks, layers * kv_heads * BLOCK * token_bytes)
    kvs = [kv_layer(memory, kv_heads, DIM, shape.fp8) for _ in range(layers)]
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
    batch = DecodeBatch(seq_lens, shuffled_table(shape.batch, shape.blocks), shape.query_len)
    q = torch.randn(rows, 16 * kv_heads, DIM, device="cuda", dtype=torch.bfloat16)
    out, lse = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
    space = MergeWorkspace(q, dense_plan(batch, q, kvs[0]).splits)
    run = paged_attention_decode_into
    return Work(
        shape=shape.name,
        calls=[partial(run, out, lse, q, kv, batch, DIM**-0.5, space) for kv in kvs],
        num_bytes=num_bytes,
        num_flops=4 * rows * q.shape[1] * shape.context * DIM,
        note=f"row {memory.pitch} B" + _torch_note(shape, q),
    )


def _torch_note(shape: Shape, q: Tensor) -> str:
    """Torch's fused attention over K and V that lie as it wants them: random numbers, without pages."""
    if shape.fp8 or shape.query_len > 1:
        return ""
    k, v = (
        torch.randn(shape.batch, shape.kv_heads, shape.context, DIM, device="cuda", dtype=q.dtype) for _ in range(2)
    )
    mine = q[:, :, None]  # [batch, num_heads, 1, DIM]
    attend = partial(functional.scaled_dot_product_attention, mine, k, v, enable_gqa=True)
    return f"; torch without pages {time_calls([attend]) * 1e6:.1f} us"
