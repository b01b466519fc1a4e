"""What a sparse layer's decode step does between its projections, in one piece: store, index, attention.

Alone, each operation follows itself. In a layer others do, and where launches overlap it counts what starts beside
what.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from pdkv_kernels.index_topk_decode import IndexWorkspace, index_topk_decode_into
from pdkv_kernels.kv_store import kv_store
from pdkv_kernels.kv_store_ref import HeadNorms, PackedHeads, TokenRows
from pdkv_kernels.paged import BLOCK, LayerPages
from pdkv_kernels.rope_ref import rope_table_ref

from benchmarks import index_topk_decode, sparse_attention_decode
from benchmarks.arena_case import Shape
from benchmarks.prefill_case import DIM
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Goal, Rates, Work

TESTS = (*index_topk_decode.TESTS, *sparse_attention_decode.TESTS)

K = 1024
_BATCHES = [
    (1, 128 * K),
    (4, 128 * K),
    (8, 128 * K),
    (16, 32 * K),
    (32, 32 * K),
    (64, 8 * K),
    (64, 64 * K),
    (256, 8 * K),
]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(
        Shape(tp, batch, context, True, 4)
        for tp in (1, 4)
        for batch, context in ((1, 32 * K), (8, 128 * K), (32, 8 * K))
    ),
]
_ORDINARY = 1 << 20
"""Numbers that the ordinary kernel in front adds 1 to: it stands for the projection, which waits for all before it."""


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: those of index and attention. The time has the store's and the ordinary kernel's in it, for both.

    vLLM's index and attention behind the same two: its own store is compiled C++.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape, question.rival)
            torch.cuda.empty_cache()


def _work(shape: Shape, with_rival: bool) -> Work:
    index, attention = index_topk_decode.make(shape), sparse_attention_decode.make(shape)
    number = max(len(index.keys), len(attention.layers))
    pages = [
        LayerPages(attention.layers[nth % len(attention.layers)], index.keys[nth % len(index.keys)])
        for nth in range(number)
    ]
    first = _before_index(attention, pages)
    chosen = torch.empty(*index.q.shape[:2], index_topk_decode.RULE.topk, dtype=torch.int32, device="cuda")
    space = IndexWorkspace(*index.q.shape[:2], shape.blocks, "cuda")
    # Its choice goes nowhere: attention has its own table, and contexts of fewer pages than the indexer's.
    choose = [
        partial(index_topk_decode_into, chosen, index.q, keys, index.batch, index_topk_decode.RULE, space)
        for keys in index.keys
    ]
    ours = _layers(first, choose, sparse_attention_decode.ours(attention))
    theirs: Sequence[Call] = ()
    if with_rival:
        theirs = _layers(first, index_topk_decode.theirs(index), sparse_attention_decode.theirs(attention))
    return Work(
        shape=shape.name,
        calls=ours,
        num_bytes=index.num_bytes + attention.num_bytes,
        rival=theirs,
        note=f"rows {index.pitch}, {attention.pitch} B",
        goal=Goal(ratio=1.0),
    )


def _before_index(attention: sparse_attention_decode.Case, pages: Sequence[LayerPages]) -> list[Call]:
    """For each layer the ordinary kernel and the store of the newest tokens."""
    shape, rows = attention.shape, attention.q.shape[0]
    heads = PackedHeads(16 * shape.kv_heads, shape.kv_heads, shape.kv_heads)
    norms = HeadNorms(*(torch.randn(DIM, device="cuda").bfloat16() for _ in range(4)), eps=1e-6)
    positions = shape.context - shape.query_len + torch.arange(shape.query_len, device="cuda").repeat(shape.batch)
    newest = attention.batch.page_table[:, -1].long().repeat_interleave(shape.query_len)
    tokens = TokenRows(newest * BLOCK + positions % BLOCK, *rope_table_ref(positions, 64, 5e6))
    packed = torch.randn(rows, heads.total, DIM, device="cuda").bfloat16()
    out = kv_store(packed, heads, norms, tokens, pages[0])
    numbers = torch.zeros(_ORDINARY, device="cuda")

    def run(layer: LayerPages) -> None:
        numbers.add_(1)
        kv_store(packed, heads, norms, tokens, layer, out)

    return [partial(run, layer) for layer in pages]


def _layers(first: Sequence[Call], choose: Sequence[Call], attend: Sequence[Call]) -> list[Call]:
    def layer(parts: tuple[Call, Call, Call]) -> Callable[[], None]:
        def run() -> None:
            for part in parts:
                part()

        return run

    count = len(first)
    return [layer((first[n], choose[n % len(choose)], attend[n % len(attend)])) for n in range(count)]
