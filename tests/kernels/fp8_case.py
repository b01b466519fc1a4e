"""A paged case whose K, V and index keys are stored in fp8, with scales that differ wildly from token to token."""

from dataclasses import dataclass, replace

import torch
from pdkv_kernels.paged import BLOCK, PagedKv
from pdkv_kernels.quantise_ref import quantise_ref, token_scale_ref
from torch import Tensor

from tests.kernels.paged_case import PagedCase, make_case


@dataclass(frozen=True)
class Fp8Case:
    case: PagedCase
    """k, v and keys are what the stored bytes mean, float64 sums away from exact; its pages are the fp8 ones."""
    exact_k: list[Tensor]  # before quantisation, for each sequence: [kv_heads, num_keys, dim]
    exact_v: list[Tensor]


def make_fp8_case(
    lengths: list[tuple[int, int]], dtype: torch.dtype = torch.float8_e4m3fn, *, scaled: bool = True, seed: int = 0
) -> Fp8Case:
    """``make_case`` quantised. Every byte that belongs to no token is 0x7F (NaN), every such scale is NaN.

    Scaled: magnitudes of K and V differ by up to 2^12 between tokens and heads; the largest stay near 1.
    """
    case = make_case(lengths, seed=seed)
    heads, dim = case.kv.k.shape[1], case.kv.k.shape[3]
    generator = torch.Generator().manual_seed(seed + 1000)
    k_pages, v_pages = (_pages(case, heads, dim, dtype) for _ in range(2))
    k_scale, v_scale = (_scales(case, heads) for _ in range(2))
    index_pages = _index_pages(case, dim)
    exact: dict[str, list[Tensor]] = {"k": [], "v": []}
    meant: dict[str, list[Tensor]] = {"k": [], "v": [], "index": []}
    for seq, (context, query) in enumerate(lengths):
        num_keys = context + query
        slots = _slots(case, seq, num_keys)
        for name, values, pages, scales in (
            ("k", case.k[seq], k_pages, k_scale),
            ("v", case.v[seq], v_pages, v_scale),
        ):
            spread = torch.exp2(-torch.randint(0, 13, (heads, num_keys, 1), generator=generator).float())
            wild = values * spread if scaled else values
            scale = token_scale_ref(wild, dtype) if scaled else None  # [heads, num_keys]
            stored = quantise_ref(wild, dtype, scale)
            pages[slots // BLOCK, :, slots % BLOCK] = stored.transpose(0, 1)
            if scale is not None:
                scales[slots // BLOCK, :, slots % BLOCK] = scale.T
            exact[name].append(wild)
            meant[name].append(stored.float() * (1.0 if scale is None else scale[..., None]))
        index = quantise_ref(case.keys[seq], torch.float8_e4m3fn)
        index_pages[slots // BLOCK, slots % BLOCK] = index
        meant["index"].append(index.float())
    kv = PagedKv(k_pages, v_pages, k_scale, v_scale) if scaled else PagedKv(k_pages, v_pages)
    index_q = quantise_ref(case.index_q, torch.float8_e4m3fn)
    stored_case = replace(
        case, kv=kv, index_k=index_pages, index_q=index_q, k=meant["k"], v=meant["v"], keys=meant["index"]
    )
    return Fp8Case(stored_case, exact["k"], exact["v"])


def _pages(case: PagedCase, heads: int, dim: int, dtype: torch.dtype) -> Tensor:
    """[num_pages, heads, BLOCK, dim] with a gap between heads and pages."""
    num_pages = case.kv.k.shape[0]
    memory = torch.full((num_pages, heads + 1, BLOCK, dim), 0x7F, dtype=torch.uint8).view(dtype)
    return memory[:, :heads]


def _scales(case: PagedCase, heads: int) -> Tensor:
    return torch.full((case.kv.k.shape[0], heads + 1, BLOCK), torch.nan)[:, :heads]


def _index_pages(case: PagedCase, dim: int) -> Tensor:
    memory = torch.full((case.kv.k.shape[0], BLOCK + 1, dim), 0x7F, dtype=torch.uint8)
    return memory.view(torch.float8_e4m3fn)[:, :BLOCK]


def _slots(case: PagedCase, seq: int, num_keys: int) -> Tensor:
    positions = torch.arange(num_keys)
    return case.queries.page_table[seq, positions // BLOCK].long() * BLOCK + positions % BLOCK
