"""Index scan and top-k of one decode step in one layer."""

from collections.abc import Iterator

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_topk_decode import IndexWorkspace, SelectionRule, index_topk_decode_into
from pdkv_kernels.paged import BLOCK
from torch import Tensor

from benchmarks import rival
from benchmarks.arena_case import Rows, Shape, shuffled_table
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Rates, Work, rotations

TESTS = "tests/kernels/test_index_topk_decode_triton.py"

K = 1024
_BATCHES = [(1, 4 * K), (1, 32 * K), (1, 128 * K), (1, 512 * K), (8, 32 * K), (8, 128 * K), (64, 8 * K), (64, 128 * K)]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(Shape(tp, 256, 8 * K, fp8) for tp in (1, 4) for fp8 in (False, True)),
    *(Shape(tp, batch, 128 * K, fp8, 4) for tp in (1, 4) for fp8 in (False, True) for batch in (1, 8, 64)),
]
RULE = SelectionRule(topk=16, init_blocks=0, local_blocks=1)
DIM = 128


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: every visible index key once. Both read the same views of arena rows: vLLM's kernel takes any strides."""
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape, question.rival)
            torch.cuda.empty_cache()


def _work(shape: Shape, with_rival: bool) -> Work:
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    key_bytes = shape.batch * shape.context * DIM * dtype.itemsize
    layers = rotations(key_bytes)
    rows = Rows(shape.batch * shape.blocks, layers * BLOCK * DIM * dtype.itemsize)
    keys = [rows.take((BLOCK, DIM), dtype) for _ in range(layers)]
    table = shuffled_table(shape.batch, shape.blocks)
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
    batch = DecodeBatch(seq_lens, table, shape.query_len)
    num_rows = shape.batch * shape.query_len
    q = torch.randn(num_rows, shape.kv_heads, DIM, device="cuda").to(dtype)
    out = torch.empty(num_rows, shape.kv_heads, RULE.topk, dtype=torch.int32, device="cuda")
    workspace = IndexWorkspace(num_rows, shape.kv_heads, shape.blocks, "cuda")

    def ours(k: Tensor) -> Call:
        return lambda: index_topk_decode_into(out, q, k, batch, RULE, workspace)

    return Work(
        shape=shape.name,
        calls=[ours(k) for k in keys],
        num_bytes=key_bytes,
        num_flops=2 * num_rows * shape.kv_heads * shape.context * DIM,
        rival=[_rival(shape, q, k, batch) for k in keys] if with_rival else (),
        note=f"row {rows.pitch} B",
    )


def _rival(shape: Shape, q: Tensor, k: Tensor, batch: DecodeBatch) -> Call:
    out = torch.empty(shape.kv_heads, q.shape[0], RULE.topk, dtype=torch.int32, device="cuda")
    lens = (batch.page_table, batch.seq_lens, shape.context)
    rule = (RULE.topk, RULE.init_blocks, RULE.local_blocks, shape.kv_heads, shape.query_len, shape.query_len)
    kernel = rival.index_topk().minimax_m3_index_decode
    return lambda: kernel(q, k, *lens, *rule, out=out)
