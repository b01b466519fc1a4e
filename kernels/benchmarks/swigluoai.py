"""The gated activation of MLPs."""

from collections.abc import Iterator

import torch
from pdkv_kernels.swigluoai import swigluoai
from pdkv_kernels.swigluoai_ref import swigluoai_ref

from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work, rotations
from benchmarks.token_rows import ROWS, eager_note

TESTS = ("tests/kernels/test_token_ops_triton.py",)
_SIZES = [3072, 12288]
"""Of an expert, and of a dense layer, at TP1."""
_ACTIVATION = (1.702, 7.0, 1.0)


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: gates and ups, and the result, once."""
    for size in _SIZES:
        for num_rows in ROWS:
            if wanted(question, _name(num_rows, size)):
                yield _work(num_rows, size)
                torch.cuda.empty_cache()


def _name(num_rows: int, size: int) -> str:
    return f"{num_rows} rows of 2 x {size}"


def _work(num_rows: int, size: int) -> Work:
    num_bytes = num_rows * size * 6
    many = [torch.randn(num_rows, 2 * size, device="cuda").bfloat16() * 4 for _ in range(rotations(num_bytes))]
    return Work(
        shape=_name(num_rows, size),
        calls=[lambda x=x: swigluoai(x, *_ACTIVATION) for x in many],
        num_bytes=num_bytes,
        ceiling="copy",
        note=eager_note([lambda x=x: swigluoai_ref(x, *_ACTIVATION).to(x.dtype) for x in many]),
    )
