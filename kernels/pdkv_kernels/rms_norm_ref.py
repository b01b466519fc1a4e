"""RMS norm as Gemma has it: the stored weight is zero-centred, so the gain is 1 + weight."""

import torch
from torch import Tensor


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. x: [..., dim], weight: [dim]; returns float32, for the caller to round once."""
    wide = x.float()
    mean_square = wide.square().mean(dim=-1, keepdim=True)
    return wide * torch.rsqrt(mean_square + eps) * (1.0 + weight.float())
