"""MXFP8 weights: e4m3 elements, and one power of two for each 32 neighbours along the input dimension."""

import torch
from torch import Tensor

from pdkv.errors import CheckpointError
from pdkv.m3.quantisation import GROUP, SCALE_SUFFIX


def dequantise(name: str, elements: Tensor, scales: Tensor, first_column: int) -> Tensor:
    """Exact float32 values of a piece of a matrix.

    elements: float8_e4m3fn [rows, columns], of which the first is ``first_column`` of the whole; scales: E8M0 bytes
    [rows, groups], those that ``scale_columns`` names: e stands for 2**(e - 127), and 255 for no number. Every product
    has four significant bits, so nothing is rounded. Raises ``CheckpointError`` naming ``name`` where one is no number.
    Formula: OCP Microscaling Formats 1.0, sections 5.2 and 6.3.
    """
    factors = scales.contiguous().view(torch.float8_e8m0fnu).float()
    begin = first_column % GROUP
    wide = factors.repeat_interleave(GROUP, dim=1)[:, begin : begin + elements.shape[1]]
    values = elements.float().mul_(wide)
    if not bool(values.isfinite().all()):
        raise CheckpointError(f"{name} or its scales ({name}{SCALE_SUFFIX}) hold values that are no numbers")
    return values
