"""What the decode attention kernels have in common as launches: pages in, results or parts of results out."""

from torch import Tensor

from pdkv_kernels.fp8_bits import fp8_code, fp8_pairs
from pdkv_kernels.launch import stages_that_fit
from pdkv_kernels.paged import PagedKv
from pdkv_kernels.softmax_merge import Parts

Arguments = dict[str, Tensor | int | bool]
"""Arguments of a Triton kernel by name."""


def page_arguments(kv: PagedKv, unused: Tensor) -> Arguments:
    """Pointers and strides of K, V and their scales, and how they are to be read.

    ``unused`` is any tensor on the device: the kernel gets it in place of scales where there are none, and does not
    read it. AssertionError if only one of K and V has scales.
    """
    assert kv.k.stride(3) == kv.v.stride(3) == 1, (kv.k.stride(), kv.v.stride())
    assert (kv.k_scale is None) == (kv.v_scale is None), "either both K and V have scales or neither"
    code, k = fp8_code(kv.k)
    pairs, v = fp8_pairs(kv.v)
    if not pairs:
        _, v = fp8_code(kv.v)
    k_scale, v_scale = kv.k_scale, kv.v_scale
    return {
        "k_ptr": k,
        "v_ptr": v,
        "k_scale_ptr": unused if k_scale is None else k_scale,
        "v_scale_ptr": unused if v_scale is None else v_scale,
        "k_page_stride": k.stride(0),
        "k_head_stride": k.stride(1),
        "k_token_stride": k.stride(2),
        "v_page_stride": v.stride(0),
        "v_head_stride": v.stride(1),
        "v_token_stride": v.stride(2),
        "k_scale_page_stride": 0 if k_scale is None else k_scale.stride(0),
        "k_scale_head_stride": 0 if k_scale is None else k_scale.stride(1),
        "v_scale_page_stride": 0 if v_scale is None else v_scale.stride(0),
        "v_scale_head_stride": 0 if v_scale is None else v_scale.stride(1),
        "CODE": code,
        "PAIRS": pairs,
        "SCALED": k_scale is not None,
    }


def tile_stages(most: int, rows: int, tile: int, q: Tensor, kv: PagedKv) -> int:
    """Stages, up to ``most``, whose tiles of K and V fit into shared memory beside q's rows and their weights."""
    dim = q.shape[2]
    return stages_that_fit(most, 2 * tile * dim * kv.k.element_size(), rows * (tile + dim) * q.element_size())


def result_arguments(out: Tensor, lse: Tensor, parts: Parts) -> Arguments:
    """Where a kernel writes: to out [num_rows, num_heads, dim] and lse if there is one part only, else to the parts."""
    if parts.lse.shape[0] == 1:
        return {
            "out_ptr": out,
            "lse_ptr": lse,
            "out_row_stride": out.stride(0),
            "out_head_stride": out.stride(1),
            "out_split_stride": 0,
            "lse_row_stride": lse.stride(0),
            "lse_head_stride": lse.stride(1),
            "lse_split_stride": 0,
            "LAST": True,
        }
    return {
        "out_ptr": parts.out,
        "lse_ptr": parts.lse,
        "out_row_stride": parts.out.stride(1),
        "out_head_stride": parts.out.stride(2),
        "out_split_stride": parts.out.stride(0),
        "lse_row_stride": parts.lse.stride(1),
        "lse_head_stride": parts.lse.stride(2),
        "lse_split_stride": parts.lse.stride(0),
        "LAST": False,
    }
