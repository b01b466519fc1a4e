"""Block scores and top-k of a prefill chunk in one layer, apart and together."""

from collections.abc import Iterator

import torch
from pdkv_kernels.index_topk_prefill import ScoreTuning, index_topk_prefill, score_blocks, select_blocks
from pdkv_kernels.paged import BLOCK

from benchmarks import rival
from benchmarks.arena_case import PITCH_TP4, Rows
from benchmarks.prefill_case import DIM, TOPK, Chunk
from benchmarks.registry import Question, wanted
from benchmarks.timing import Goal, Rates, Work

TESTS = ("tests/kernels/test_index_topk_prefill_triton.py",)

K = 1024
_PLACES = [(8 * K, 8 * K), (8 * K, 64 * K), (8 * K, 128 * K), (2 * K, 32 * K), (16 * K, 256 * K)]
SHAPES = [Chunk(tp, *at, kind) for tp in (1, 4) for kind in ("bf16", "fp8") for at in _PLACES]


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Both read the same views of arena rows: vLLM's kernels take any strides. Its scores are all there at one time;
    ours, where a chunk and context need more than the bounded buffer, are only timed together."""
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield from _works(shape, question.rival)
            torch.cuda.empty_cache()


def _works(shape: Chunk, with_rival: bool) -> Iterator[Work]:
    heads, rows = shape.kv_heads, shape.rows
    memory = Rows(shape.blocks, PITCH_TP4)
    keys = memory.take((BLOCK, DIM), shape.dtype)
    queries = shape.queries()
    q = torch.randn(rows, heads, DIM, device="cuda").to(shape.dtype)
    out = torch.empty(rows, heads, TOPK, dtype=torch.int32, device="cuda")
    scores = torch.empty(shape.blocks, rows * heads, dtype=torch.float32, device="cuda")
    flops = int((shape.positions() + 1).sum()) * heads * DIM * 2
    tuning, part, rule = ScoreTuning(), (0, rows), (TOPK, 0, 1)
    key_bytes = shape.context * DIM * shape.dtype.itemsize
    score_bytes = int((shape.positions() // BLOCK + 1).sum()) * heads * 4

    lens = torch.tensor([shape.context], dtype=torch.int32, device="cuda")
    vllm = rival.index_topk() if with_rival else None
    where = (queries.page_table, queries.query_starts, lens, queries.context_lens, rows, shape.context, heads)
    their_scores = vllm.minimax_m3_index_score(q, keys, *where) if vllm else None
    their_out = torch.empty(heads, rows, TOPK, dtype=torch.int32, device="cuda")
    chunk = (queries.query_starts, queries.context_lens, rows)

    def their_score() -> None:
        vllm.minimax_m3_index_score(q, keys, *where)

    def their_topk() -> None:
        vllm.minimax_m3_index_topk(their_scores, *chunk, *rule, out=their_out)

    def theirs() -> None:
        vllm.minimax_m3_index_topk(vllm.minimax_m3_index_score(q, keys, *where), *chunk, *rule, out=their_out)

    ceiling = "bf16" if shape.kind == "bf16" else "fp8"
    yield Work(
        shape=f"{shape.name} score",
        calls=[lambda: score_blocks(q, keys, queries, scores, part, tuning)],
        num_bytes=q.nbytes + key_bytes + score_bytes,
        num_flops=flops,
        ceiling=ceiling,
        rival=[their_score] if vllm else (),
        note=f"row {memory.pitch} B",
        goal=Goal(ratio=1.0 if shape.tp == 1 else 1.3),
    )
    yield Work(
        shape=f"{shape.name} top-k",
        calls=[lambda: select_blocks(scores, queries, part, rule, out, tuning)],
        num_bytes=score_bytes + out.nbytes,
        rival=[their_topk] if vllm else (),
        goal=Goal(ratio=3.0),
    )
    yield Work(
        shape=f"{shape.name} both",
        calls=[lambda: index_topk_prefill(q, keys, queries, *rule, out)],
        num_bytes=q.nbytes + key_bytes + out.nbytes,
        num_flops=flops,
        ceiling=ceiling,
        rival=[theirs] if vllm else (),
    )
