"""Round vectors into their pages: the one place where state is rounded, whatever model it comes from."""

from torch import Tensor

from pdkv_kernels.paged import BLOCK
from pdkv_kernels.quantise_ref import quantise_ref, token_scale_ref


def cast_store_ref(values: Tensor, pages: Tensor, slots: Tensor, scales: Tensor | None = None) -> None:
    """Write row i into slot ``slots[i]`` of ``pages``, in place; nothing else of any page changes.

    K or V: values float [num_rows, heads, dim] into pages [num_pages, heads, BLOCK, dim]. Index keys, which have no
    heads: [num_rows, dim] into [num_pages, BLOCK, dim]. Pages may have any strides and any dtype.

    scales: float32 [num_pages, heads, BLOCK]; where given, each vector is divided by its own scale, which is stored.
    slots: int64 [num_rows], page * BLOCK + offset, none twice; -1 stores nothing (a padded row of a fixed batch).
    """
    taken = slots >= 0
    values, slots = values[taken].float(), slots[taken]
    page, offset = slots // BLOCK, slots % BLOCK
    scale = None
    if scales is not None:
        scale = token_scale_ref(values, pages.dtype)  # [num_rows, heads]
        scales[page, :, offset] = scale
    rows = quantise_ref(values, pages.dtype, scale)
    if pages.dim() == 3:
        pages[page, offset] = rows
    else:
        pages[page, :, offset] = rows
