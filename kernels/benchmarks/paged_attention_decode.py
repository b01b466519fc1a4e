"""Attention of one decode step to all keys, in one dense layer."""

from collections.abc import Iterator
from functools import partial

import torch
from pdkv_kernels.decode_batch import DecodeBatch
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.paged_attention_decode import dense_plan, paged_attention_decode_into
from pdkv_kernels.softmax_merge import MergeWorkspace
from torch import Tensor
from torch.nn import functional

from benchmarks import rival
from benchmarks.arena_case import Rows, Shape, kv_layer, shuffled_table
from benchmarks.registry import Question, wanted
from benchmarks.timing import Call, Rates, Work, rotations, time_calls

TESTS = ("tests/kernels/test_paged_attention_decode_triton.py",)

K = 1024
_BATCHES = [(1, 8 * K), (1, 128 * K), (8, 32 * K), (64, 8 * K), (256, 8 * K)]
SHAPES = [
    *(Shape(tp, batch, context, fp8) for tp in (1, 4) for fp8 in (False, True) for batch, context in _BATCHES),
    *(Shape(tp, 8, 32 * K, fp8, 4) for tp in (1, 4) for fp8 in (False, True)),
]
DIM = 128
_SEGMENTS, _LEAST_PROGRAMS = 16, 128
"""Of vLLM's backend: parts of a sequence where batches are small, and the programs from which they are not."""


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: K, V and scales of all keys once. vLLM's is its Triton backend, which takes any strides, so both read the
    same views. In bf16 with one row a sequence, torch's fused attention over one contiguous copy of K and V is noted.
    """
    for shape in SHAPES:
        if wanted(question, shape.name):
            yield _work(shape, question.rival)
            torch.cuda.empty_cache()


def _work(shape: Shape, with_rival: bool) -> Work:
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
        rival=_theirs(shape, q, kvs, batch) if with_rival else (),
        note=f"row {memory.pitch} B" + _torch_note(shape, q),
    )


def _theirs(shape: Shape, q: Tensor, kvs: list[PagedKv], batch: DecodeBatch) -> list[Call]:
    """As vLLM's Triton backend calls it: small batches with sequences in parts, large ones without."""
    rows, heads, _ = q.shape
    parts = (rows, heads, _SEGMENTS)
    results = torch.empty(*parts, DIM, dtype=torch.float32, device="cuda")
    tops, sums = (torch.empty(parts, dtype=torch.float32, device="cuda") for _ in range(2))
    starts = torch.arange(0, rows + 1, shape.query_len, dtype=torch.int32, device="cuda")
    out = torch.empty_like(q)
    mode = rival.CacheMode.FP8_PER_TOKEN_HEAD if shape.fp8 else rival.CacheMode.NONE
    run = partial(
        rival.paged_attention().unified_attention, q=q, out=out, cu_seqlens_q=starts, max_seqlen_q=shape.query_len,
        seqused_k=batch.seq_lens, max_seqlen_k=shape.context, softmax_scale=DIM**-0.5, causal=True,
        window_size=(-1, -1), block_table=batch.page_table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
        seq_threshold_3D=_LEAST_PROGRAMS // shape.kv_heads, num_par_softmax_segments=_SEGMENTS,
        softmax_segm_output=results, softmax_segm_max=tops, softmax_segm_expsum=sums, kv_quant_mode=mode,
    )  # fmt: skip
    calls = []
    for kv in kvs:
        scales = [None if one is None else one.transpose(1, 2) for one in (kv.k_scale, kv.v_scale)]
        k, v = kv.k.transpose(1, 2), kv.v.transpose(1, 2)
        calls.append(partial(run, k=k, v=v, k_scale_cache=scales[0], v_scale_cache=scales[1]))
    return calls


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
