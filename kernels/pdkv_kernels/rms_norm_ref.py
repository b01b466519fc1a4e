"""RMS norm as Gemma has it: the stored weight is zero-centred, so the gain is 1 + weight."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. x: [..., dim], weight: [dim]; returns float32, for the caller to round once.

    Squares are float32; their sum and its root are float64 and rounded once, so that the result does not depend on
    the order of the sum: the same bits on every device, whatever the tiles.
    """
    wide = x.float()
    mean_square = wide.square().sum(dim=-1, keepdim=True, dtype=torch.float64) / x.shape[-1]
    inverse = (1.0 / (mean_square + eps).sqrt()).float()
    return wide * inverse * (1.0 + weight.float())
