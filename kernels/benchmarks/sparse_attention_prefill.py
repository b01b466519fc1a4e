"""Attention of a prefill chunk to the selected blocks, in one layer."""

from collections.abc import Iterator

import torch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.sparse_attention_prefill import sparse_attention_prefill
from torch import Tensor

from benchmarks import rival
from benchmarks.prefill_case import DIM, Chunk
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Goal, Rates, Work

TESTS = ("tests/kernels/test_sparse_attention_prefill_triton.py",)

K = 1024
_PLACES = [(8 * K, 8 * K), (8 * K, 64 * K), (8 * K, 128 * K)]
SHAPES = [
    *(
        Chunk(tp, *at, kind, win)
        for tp in (1, 4)
        for win in (False, True)
        for kind in ("bf16", "fp8")
        for at in _PLACES
    ),
    *(Chunk(tp, 8 * K, 128 * K, "fp8u", win) for tp in (1, 4) for win in (False, True)),
    *(
        Chunk(4, *at, kind, True)
        for kind in ("bf16", "fp8")
        for at in [(2 * K, 32 * K), (4 * K, 128 * K), (16 * K, 256 * K)]
    ),
]
"""windows: 64 neighbouring rows share 13 of their 16 blocks; otherwise each row has random blocks of its own."""
SCALE = DIM**-0.5
_GOALS = {(False, True): Goal(1.3), (False, False): Goal(2.5), (True, True): Goal(2.5), (True, False): Goal(4.0)}
"""By whether neighbours choose alike, and whether in bf16."""


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Products count for keys that a row sees. Bytes: q, the output, and each page's K, V and scales once.

    vLLM's kernel wants K and V of a token side by side and scales in a table of their own: it gets copies so laid out.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape, question.rival)
            torch.cuda.empty_cache()


def _work(shape: Chunk, with_rival: bool) -> Work:
    kv, pitch = shape.kv()
    queries, blocks = shape.queries(), shape.choices()
    q = torch.randn(shape.rows, 16 * shape.kv_heads, DIM, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(q), torch.empty(q.shape[:2], dtype=torch.float32, device="cuda")
    seen = (shape.positions()[:, None, None] - blocks * BLOCK + 1).clamp(max=BLOCK).masked_fill(blocks < 0, 0)
    token_bytes = 2 * DIM * kv.k.element_size() + (8 if kv.k_scale is not None else 0)
    return Work(
        shape=shape.name,
        calls=[lambda: sparse_attention_prefill(q, kv, blocks, queries, SCALE, out)],
        num_bytes=2 * q.nbytes + shape.kv_heads * shape.context * token_bytes,
        num_flops=int(seen.sum()) * 16 * DIM * 4,
        ceiling="bf16",
        rival=[_rival(shape, q, kv, blocks, queries)] if with_rival else (),
        note=f"row {pitch} B",
        goal=_GOALS[shape.windows, shape.kind == "bf16"],
    )


def _rival(shape: Chunk, q: Tensor, kv: PagedKv, blocks: Tensor, queries: RaggedQueries) -> Call:
    side_by_side = torch.cat((kv.k.contiguous().view(torch.uint8), kv.v.contiguous().view(torch.uint8)), dim=-1)
    cache = side_by_side.view(kv.k.dtype)  # [num_pages, kv_heads, BLOCK, 2 * DIM]
    k_scale = v_scale = None
    if kv.k_scale is not None and kv.v_scale is not None:
        k_scale = kv.k_scale.transpose(0, 1).reshape(shape.kv_heads, -1)
        v_scale = kv.v_scale.transpose(0, 1).reshape(shape.kv_heads, -1)
    out = torch.empty_like(q)
    lens = torch.tensor([shape.context], dtype=torch.int32, device="cuda")
    by_head = blocks.transpose(0, 1)
    where = (queries.page_table, queries.query_starts, lens, queries.context_lens, shape.rows, shape.kv_heads)
    kernel = rival.sparse_attention().minimax_m3_sparse_attn
    return lambda: kernel(q, cache, by_head, *where, SCALE, out, k_scale, v_scale)
