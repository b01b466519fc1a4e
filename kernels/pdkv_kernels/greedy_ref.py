"""The likeliest token behind each row of logits, and how likely it is."""

import torch
from torch import Tensor

NOT_FINITE = -1
"""Told instead of a token where logits are not finite."""


def greedy_ref(out: Tensor, logits: Tensor) -> None:
    """out: int64 [3, num_rows], each row contiguous; logits: [num_rows, vocab] of any float.

    Into out: the likeliest token, of equals the lowest; the same as it is told, ``NOT_FINITE`` where any logit of the
    row is not finite; the bits, in float64, of its log-probability, which is minus the logarithm of the sum of
    exp(logit - largest logit), computed in float32.
    """
    logits = logits.float()
    token = logits.argmax(dim=-1)
    logprob = -(logits - logits.amax(dim=-1, keepdim=True)).exp().sum(dim=-1).log()
    out[0] = token
    out[1] = torch.where(logits.isfinite().all(dim=-1), token, NOT_FINITE)
    out[2] = logprob.double().view(torch.int64)
