"""Dense paged attention against the plain formula, one row at a time."""

from dataclasses import replace

import pytest
import torch
from pdkv_kernels.paged import PagedKv
from pdkv_kernels.paged_attention_ref import paged_attention_ref

from tests.kernels.paged_case import MIXED, PagedCase, make_case, plain_attention

SCALE = 16**-0.5


def check(case: PagedCase, tolerance: float = 2e-5) -> None:
    out, lse = paged_attention_ref(case.q, case.kv, case.queries, SCALE)
    for row, seq, position in case.rows():
        visible = torch.ones(case.kv.k.shape[1], position + 1, dtype=torch.bool)
        expected, expected_lse = plain_attention(case, row, seq, position, visible, SCALE)
        torch.testing.assert_close(out[row].double(), expected, atol=tolerance, rtol=0)
        torch.testing.assert_close(lse[row].double(), expected_lse, atol=tolerance, rtol=0)


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(8, 4), (4, 4), (6, 1), (3, 3)])
def test_equals_the_plain_formula(num_heads: int, kv_heads: int):
    check(make_case(MIXED, num_heads=num_heads, kv_heads=kv_heads))


@pytest.mark.parametrize("lengths", [[(0, 1)], [(0, 127)], [(1, 128)], [(3000, 2)], [(100, 1100)]])
def test_odd_lengths_and_several_tiles(lengths: list[tuple[int, int]]):
    check(make_case(lengths, num_heads=2, kv_heads=1))


def test_bfloat16_pages_are_widened_before_any_sum():
    check(make_case(MIXED, dtype=torch.bfloat16))


def test_pages_shared_by_two_sequences():
    case = make_case([(300, 2), (300, 2)])
    table = case.queries.page_table.clone()
    table[1] = table[0]
    queries = replace(case.queries, page_table=table)
    out, _ = paged_attention_ref(torch.cat([case.q[:2]] * 2), case.kv, queries, SCALE)
    assert torch.equal(out[:2], out[2:])


def test_scales_of_each_token_and_head():
    case = make_case([(400, 40), (129, 1)])
    expected = paged_attention_ref(case.q, case.kv, case.queries, SCALE)
    factor = torch.exp2(torch.randint(-6, 7, case.kv.k.shape[:3]).float())
    scaled = PagedKv(case.kv.k * factor[..., None], case.kv.v * factor[..., None], 1 / factor, 1 / factor)
    for one, other in zip(paged_attention_ref(case.q, scaled, case.queries, SCALE), expected, strict=True):
        torch.testing.assert_close(one, other)
