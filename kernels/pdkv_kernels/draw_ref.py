"""Tokens drawn behind rows of logits, with randomness of seed and position alone, and the likeliest to tell of."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pdkv_kernels.greedy_ref import NOT_FINITE

TEMPERATURE, TOP_P, SEED, NUM_TOP, ASKED = 0, 1, 2, 3, 4
"""Columns of what is asked of a row, and how many there are: bits of the temperature and of top_p in float64 (a
temperature of 0 is greedy), the seed's 64 bits, and how many of the likeliest tokens are to be told of."""

_SEED_BITS = 64


def draw_ref(chosen: Tensor, tops: Tensor, logits: Tensor, asked: Tensor, positions: Tensor) -> None:
    """chosen: int64 [3, num_rows], each row contiguous, as ``greedy`` left it; tops: int64 [num_rows, 2, most_top];
    logits: [num_rows, vocab] of any float; asked: int64 [num_rows, ASKED]; positions: int64 [num_rows], of the tokens
    before those to choose.

    Into chosen, where a row has a temperature and is finite: the token drawn, and its log-probability under the plain
    softmax. Into tops, where some are asked for: ids of the likeliest tokens, likeliest first, and bits of their
    log-probabilities in float64. Nothing else is written to.
    """
    temperatures, shares = (asked[:, column].contiguous().view(torch.float64) for column in (TEMPERATURE, TOP_P))
    is_sound = chosen[1] != NOT_FINITE
    drawn = (is_sound & (temperatures > 0)).nonzero().flatten()
    if drawn.numel():
        seeds, after = asked[drawn, SEED].tolist(), (positions[drawn] + 1).tolist()
        numbers = [uniform(seed, position) for seed, position in zip(seeds, after, strict=True)]
        rows = logits[drawn].double()
        tokens = draw_rows(rows, temperatures[drawn].tolist(), shares[drawn].tolist(), numbers)
        chosen[:2, drawn] = tokens
        chosen[2, drawn] = rows.log_softmax(dim=-1).gather(1, tokens[:, None])[:, 0].view(torch.int64)
    for row in (is_sound & (asked[:, NUM_TOP] > 0)).nonzero().flatten().tolist():
        count = min(int(asked[row, NUM_TOP]), logits.shape[1])
        values, ids = logits[row].double().log_softmax(dim=-1).topk(count)
        tops[row, 0, :count] = ids
        tops[row, 1, :count] = values.view(torch.int64)


def draw_rows(
    logits: Tensor, temperatures: Sequence[float], top_p: Sequence[float], numbers: Sequence[float]
) -> Tensor:  # float64 [num_rows, vocab] -> int64 [num_rows]
    """Invert the cumulative distributions at ``numbers``, in [0, 1), one a row.

    Tokens keep the order of their ids whatever ``top_p`` leaves out, so a nucleus of all of them changes no draw.
    """
    divisors, wanted = (
        torch.tensor(column, dtype=logits.dtype, device=logits.device) for column in (temperatures, numbers)
    )
    weights = (logits - logits.amax(dim=-1, keepdim=True)).div_(divisors[:, None]).exp_()
    nuclei = [row for row, share in enumerate(top_p) if share < 1.0]
    if nuclei:
        cut = weights[nuclei]
        weights[nuclei] = torch.where(_nucleus(cut, [top_p[row] for row in nuclei]), cut, 0.0)
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    target = torch.minimum(total * wanted, total.nextafter(torch.zeros_like(total)))  # the end itself is nobody's
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _nucleus(weights: Tensor, top_p: Sequence[float]) -> Tensor:  # [num_rows, vocab], sums not 1 -> bool, same shape
    """The fewest likeliest tokens that have ``top_p`` of all weight: those before which less than that has come.

    At least one; of equals those with the lowest ids.
    """
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    shares = torch.tensor(top_p, dtype=weights.dtype, device=weights.device)
    kept = before < (shares * ordered.sum(dim=-1))[:, None]
    kept[:, 0] = True
    return torch.zeros_like(kept).scatter(1, order, kept)


def uniform(seed: int, position: int) -> float:
    """In [0, 1), 53 random bits: Philox is a hash of its key, here (seed, position)."""
    key = np.array([seed % (1 << _SEED_BITS), position], dtype=np.uint64)
    raw = int(np.random.Philox(key=key).random_raw())
    return (raw >> 11) * 2.0**-53
