"""Attention of one decode step to the selected blocks, in one layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.softmax_merge import MergeWorkspace
from pdkv_kernels.sparse_attention_decode import AttendPlan, sparse_attention_decode_into
from torch import Tensor

from benchmarks import rival
from benchmarks.arena_case import Rows, Shape, kv_layer
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Goal, Rates, Work, rotations

TESTS = ("tests/kernels/test_sparse_attention_decode_triton.py", "tests/kernels/test_attend_ring.py")

K = 1024
_BATCHES = [(1, 128 * K), (8, 128 * K), (64, 128 * K), (64, 8 * K), (256, 8 * K)]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(Shape(tp, batch, 128 * K, fp8, 4) for tp in (1, 4) for fp8 in (False, True) for batch in (1, 8, 64)),
]
TOPK = 16
DIM = 128
SCALE = DIM**-0.5
_PAGES_OF_A_SEQUENCE = 64
"""Physical pages: longer contexts use them over and over, but choices know each under one number."""


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: K, V and scales of the selected blocks, once for each row that selected them.

    vLLM's kernel wants K and V of a token side by side and scales in a table of their own, so it gets a cache of
    its own layout with the same number of pages.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            case = make(shape)
            yield Work(
                shape=shape.name,
                calls=ours(case),
                num_bytes=case.num_bytes,
                num_flops=4 * case.q.shape[0] * case.q.shape[1] * TOPK * BLOCK * DIM,
                rival=theirs(case) if question.rival else (),
                note=f"row {case.pitch} B",
                goal=_goal(shape),
            )
            del case
            torch.cuda.empty_cache()


def _goal(shape: Shape) -> Goal:
    if shape.batch < 64:
        return Goal(ratio=1.0)
    return Goal(ratio=2.0, share=0.85) if shape.fp8 else Goal(ratio=1.1)


@dataclass(frozen=True)
class Case:
    """One shape's tensors; K and V once for each layer, so that no cache holds them all."""

    shape: Shape
    batch: DecodeBatch
    q: Tensor  # bfloat16 [num_rows, num_heads, DIM]
    blocks: Tensor  # int32 [num_rows, kv_heads, TOPK]
    layers: list[PagedKv]
    pitch: int  # bytes from one page's row to the next

    @property
    def num_bytes(self) -> int:
        token_bytes = 2 * DIM * self.layers[0].k.element_size() + (8 if self.shape.fp8 else 0)
        return self.blocks.numel() * BLOCK * token_bytes


def make(shape: Shape) -> Case:
    """Random K and V, and random distinct blocks for each row and kv head."""
    rows, kv_heads = shape.batch * shape.query_len, shape.kv_heads
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    head_bytes = 2 * BLOCK * DIM * dtype.itemsize + (2 * BLOCK * 4 if shape.fp8 else 0)
    layers = rotations(rows * kv_heads * TOPK * head_bytes)
    distinct = min(shape.blocks, _PAGES_OF_A_SEQUENCE)
    memory = Rows(shape.batch * distinct, layers * kv_heads * head_bytes)
    pages = torch.randperm(shape.batch * distinct, device="cuda", dtype=torch.int32).view(shape.batch, distinct)
    table = pages.repeat(1, -(-shape.blocks // distinct))[:, : shape.blocks].contiguous()
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
    turns = torch.randint(shape.blocks // distinct, (shape.batch, distinct), device="cuda")
    choice = torch.rand(rows, kv_heads, distinct - 1, device="cuda").topk(TOPK).indices
    choice[..., 0], turns[:, -1] = distinct - 1, shape.blocks // distinct - 1  # the row's own block
    turn = turns.repeat_interleave(shape.query_len, 0)[:, None].expand(-1, kv_heads, -1).gather(2, choice)
    return Case(
        shape,
        DecodeBatch(seq_lens, table, shape.query_len),
        torch.randn(rows, 16 * kv_heads, DIM, device="cuda", dtype=torch.bfloat16),
        (turn * distinct + choice).int(),
        [kv_layer(memory, kv_heads, DIM, shape.fp8) for _ in range(layers)],
        memory.pitch,
    )


def ours(case: Case, plan: AttendPlan | None = None) -> list[Call]:
    """A call for each layer."""
    rows, heads, dim = case.q.shape
    out = torch.empty_like(case.q)
    lse = torch.empty(rows, heads, dtype=torch.float32, device="cuda")
    space = MergeWorkspace(case.q, TOPK)
    run = sparse_attention_decode_into
    return [partial(run, out, lse, case.q, kv, case.blocks, case.batch, SCALE, space, plan) for kv in case.layers]


def theirs(case: Case) -> list[Call]:
    """vLLM's, on caches of its own layout."""
    shape = case.shape
    pages = case.layers[0].k.shape[0]
    caches = Rows(pages, len(case.layers) * shape.kv_heads * BLOCK * 2 * DIM * case.layers[0].k.element_size())
    out = torch.empty_like(case.q)
    scales = None
    if shape.fp8:
        scales = torch.rand(shape.kv_heads, pages * BLOCK, device="cuda") * 0.01 + 0.01
    blocks = case.blocks.transpose(0, 1)
    kernel = rival.sparse_attention().minimax_m3_sparse_attn_decode
    lens = (case.batch.page_table, case.batch.seq_lens, shape.kv_heads, SCALE, out, shape.query_len)
    dtype = case.layers[0].k.dtype
    views = [caches.take((shape.kv_heads, BLOCK, 2 * DIM), dtype) for _ in case.layers]
    return [partial(kernel, case.q, view, blocks, *lens, k_scale=scales, v_scale=scales) for view in views]
