"""Attention over gathered pages against the reference: ragged chunks, scales, NaN behind the last key."""

import pytest
import torch
from pdkv_kernels.paged import BLOCK, PagedKv, RaggedQueries
from pdkv_kernels.paged_attention_gathered import paged_attention_gathered
from pdkv_kernels.paged_attention_ref import paged_attention_ref

HEADS, KV_HEADS, DIM, NUM_PAGES = 8, 2, 32, 12
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])])
@pytest.mark.parametrize("stored", ["float32", "float8_e4m3fn"])
def test_equals_the_reference(device: str, stored: str) -> None:
    counts, contexts = [70, 0, 1, 200], [300, 5, 128, 0]
    lengths = [count + context for count, context in zip(counts, contexts, strict=True)]
    free = iter(torch.randperm(NUM_PAGES).tolist())
    table = torch.full((4, 3), -1, dtype=torch.int32)
    k, v = (torch.randn(NUM_PAGES, KV_HEADS, BLOCK, DIM) for _ in range(2))
    scales = torch.rand(2, NUM_PAGES, KV_HEADS, BLOCK) + 0.5 if stored != "float32" else None
    for seq, length in enumerate(lengths):
        for block in range(-(-length // BLOCK)):
            table[seq, block] = page = next(free)
            left = length - block * BLOCK
            k[page, :, max(left, 0) :] = torch.nan
            v[page, :, max(left, 0) :] = torch.nan
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    queries = RaggedQueries(starts.to(device), torch.tensor(contexts).int().to(device), table.to(device))
    k, v = k.to(getattr(torch, stored)).to(device), v.to(getattr(torch, stored)).to(device)
    k_scale, v_scale = (None, None) if scales is None else scales.to(device)
    kv = PagedKv(k, v, k_scale, v_scale)
    q = torch.randn(sum(counts), HEADS, DIM, device=device)
    wanted, _ = paged_attention_ref(q, kv, queries, DIM**-0.5)
    found = paged_attention_gathered(q, kv, queries, DIM**-0.5)
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
