"""Index scan and top-k of one decode step in one layer."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.index_scan import ScanPlan
from pdkv_kernels.index_topk_decode import IndexWorkspace, SelectionRule, index_topk_decode_into
from pdkv_kernels.paged import BLOCK
from torch import Tensor

from benchmarks import rival
from benchmarks.arena_case import Rows, Shape, shuffled_table
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Goal, Rates, Work, rotations

TESTS = (
    "tests/kernels/test_index_topk_decode_triton.py",
    "tests/kernels/test_index_ring.py",
    "tests/kernels/test_index_choice.py",
)

K = 1024
_BATCHES = [(1, 4 * K), (1, 32 * K), (1, 128 * K), (1, 512 * K), (8, 32 * K), (8, 128 * K), (64, 8 * K), (64, 128 * K)]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(Shape(tp, 256, 8 * K, fp8) for tp in (1, 4) for fp8 in (False, True)),
    *(Shape(tp, batch, 128 * K, fp8, 4) for tp in (1, 4) for fp8 in (False, True) for batch in (1, 8, 64)),
]
RULE = SelectionRule(topk=16, init_blocks=0, local_blocks=1)
DIM = 128
GOAL = Goal(ratio=1.3, share=0.9)


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: every visible index key once. Both read the same views of arena rows: vLLM's kernel takes any strides.

    Calls follow one another, and each is told so. How the engine has them, between other kernels: ``decode_layer``.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(make(shape), question.rival)
            torch.cuda.empty_cache()


@dataclass(frozen=True)
class Case:
    """One shape's tensors; the index keys once for each layer, so that no cache holds them all."""

    shape: Shape
    batch: DecodeBatch
    q: Tensor  # [num_rows, heads, DIM]
    keys: list[Tensor]  # of each layer: [num_pages, BLOCK, DIM]
    pitch: int  # bytes from one page's row to the next

    @property
    def num_bytes(self) -> int:
        return self.shape.batch * self.shape.context * DIM * self.q.element_size()


def make(shape: Shape) -> Case:
    """Random keys under a shuffled page table."""
    dtype = torch.float8_e4m3fn if shape.fp8 else torch.bfloat16
    layers = rotations(shape.batch * shape.context * DIM * dtype.itemsize)
    rows = Rows(shape.batch * shape.blocks, layers * BLOCK * DIM * dtype.itemsize)
    keys = [rows.take((BLOCK, DIM), dtype) for _ in range(layers)]
    seq_lens = torch.full((shape.batch,), shape.context, dtype=torch.int32, device="cuda")
    # Settled: all of it is written once, long before the calls that are timed.
    batch = DecodeBatch(seq_lens, shuffled_table(shape.batch, shape.blocks), shape.query_len, settled=True)
    q = torch.randn(shape.batch * shape.query_len, shape.kv_heads, DIM, device="cuda").to(dtype)
    return Case(shape, batch, q, keys, rows.pitch)


def ours(case: Case, plan: ScanPlan | None = None) -> list[Call]:
    """A call for each layer."""
    rows, heads, _ = case.q.shape
    out = torch.empty(rows, heads, RULE.topk, dtype=torch.int32, device="cuda")
    workspace = IndexWorkspace(rows, heads, case.shape.blocks, "cuda")
    run = partial(index_topk_decode_into, scan_follows=True)
    return [partial(run, out, case.q, k, case.batch, RULE, workspace, plan) for k in case.keys]


def theirs(case: Case) -> list[Call]:
    """vLLM's, on the same keys and page table."""
    shape = case.shape
    out = torch.empty(shape.kv_heads, case.q.shape[0], RULE.topk, dtype=torch.int32, device="cuda")
    lens = (case.batch.page_table, case.batch.seq_lens, shape.context)
    rule = (RULE.topk, RULE.init_blocks, RULE.local_blocks, shape.kv_heads, shape.query_len, shape.query_len)
    kernel = rival.index_topk().minimax_m3_index_decode
    return [partial(kernel, case.q, k, *lens, *rule, out=out) for k in case.keys]


def _work(case: Case, with_rival: bool) -> Work:
    shape = case.shape
    return Work(
        shape=shape.name,
        calls=ours(case),
        num_bytes=case.num_bytes,
        num_flops=2 * case.q.shape[0] * shape.kv_heads * shape.context * DIM,
        rival=theirs(case) if with_rival else (),
        note=f"row {case.pitch} B",
        goal=GOAL,
    )
