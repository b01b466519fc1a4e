"""The sum of residual stream and a layer's output, and its norm."""

from collections.abc import Iterator

import torch
from pdkv_kernels.rms_norm import add_rms_norm
from pdkv_kernels.rms_norm_ref import rms_norm_ref
from torch import Tensor

from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work, rotations
from benchmarks.token_rows import HIDDEN, ROWS, eager_note

TESTS = ("tests/kernels/test_token_ops_triton.py",)


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: both summands, the sum and its norm once."""
    for num_rows in ROWS:
        if wanted(question, f"{num_rows} rows"):
            yield _work(num_rows)
            torch.cuda.empty_cache()


def _work(num_rows: int) -> Work:
    weight = torch.randn(HIDDEN, device="cuda")
    one = num_rows * HIDDEN * 2
    pairs = [_rows(num_rows) for _ in range(rotations(4 * one))]
    return Work(
        shape=f"{num_rows} rows",
        calls=[lambda x=x, more=more: add_rms_norm(x, more, weight, 1e-6) for x, more in pairs],
        num_bytes=4 * one + weight.nbytes,
        ceiling="copy",
        note=eager_note([lambda x=x, more=more: _eager(x, more, weight) for x, more in pairs]),
    )


def _rows(num_rows: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, num_rows, HIDDEN, device="cuda").bfloat16()
    return x[0], x[1]


def _eager(x: Tensor, more: Tensor, weight: Tensor) -> Tensor:
    return rms_norm_ref(x + more, weight, 1e-6).to(x.dtype)
