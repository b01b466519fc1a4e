"""Insert new tokens into their pages, rounding once into the dtype of the cache."""

import torch
from torch import Tensor


def kv_store_ref(values: Tensor, pages: Tensor, page_ids: Tensor, offsets: Tensor) -> None:
    """Write row i into row ``offsets[i]`` of page ``page_ids[i]``, in place; nothing else of any page changes.

    K or V: values [num_rows, heads, dim] into pages [num_pages, heads, BLOCK, dim]. Index keys, which have no heads:
    [num_rows, dim] into [num_pages, BLOCK, dim]. Pages may have any strides. page_ids, offsets: int64 [num_rows], no
    pair twice. float32 or bfloat16 pages: fp8 ones would need scales, which this operation does not write.
    """
    assert pages.dtype in (torch.float32, torch.bfloat16), f"pages of {pages.dtype} cannot be written"
    if pages.dim() == 3:
        pages[page_ids, offsets] = values.to(pages.dtype)
    else:
        pages[page_ids, :, offsets] = values.to(pages.dtype)
