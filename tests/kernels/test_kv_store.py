"""Insertion of new tokens into strided pages."""

import pytest
import torch
from pdkv_kernels.kv_store_ref import kv_store_ref

from tests.kernels.paged_case import make_case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["k", "v", "index_k"])
def test_writes_its_rows_bit_exactly_and_nothing_else(dtype: torch.dtype, name: str):
    case = make_case([(300, 4)], dtype=dtype)
    pages = {"k": case.kv.k, "v": case.kv.v, "index_k": case.index_k}[name]
    memory = torch.empty(0, dtype=dtype).set_(pages.untyped_storage())
    before = memory.clone()
    heads = () if name == "index_k" else (4,)
    values = torch.randn(5, *heads, 16)
    values.view(-1)[:3] = torch.tensor([1.00390625, 3.4e38, -0.0])  # a tie between two bfloat16, an overflow
    page_ids, offsets = torch.tensor([2, 0, 2, 5, 1]), torch.tensor([127, 0, 126, 64, 3])
    kv_store_ref(values, pages, page_ids, offsets)
    for value, page, offset in zip(values, page_ids, offsets, strict=True):
        stored = pages[page, offset] if name == "index_k" else pages[page, :, offset]
        assert torch.equal(stored, value.to(dtype))
    changed = ~((memory == before) | (memory.isnan() & before.isnan()))
    assert int(changed.sum()) <= values.numel()
