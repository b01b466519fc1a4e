"""Four of 128 experts for each row: product in float32 precision, sigmoid, biased choice, weights."""

from collections.abc import Iterator

import torch
from pdkv_kernels.router_topk import router_topk
from pdkv_kernels.router_topk_ref import router_topk_ref

from benchmarks.registry import Question, wanted
from benchmarks.timing import Rates, Work
from benchmarks.token_rows import HIDDEN, ROWS, eager_note

TESTS = ("tests/kernels/test_token_ops_triton.py",)
_EXPERTS, _CHOSEN = 128, 4


def works(question: Question, rates: Rates) -> Iterator[Work]:
    """Bytes: rows, router and choice once. Both call the same weights again and again, as a layer's rows do."""
    for num_rows in ROWS:
        if wanted(question, f"{num_rows} rows"):
            yield _work(num_rows)
            torch.cuda.empty_cache()


def _work(num_rows: int) -> Work:
    x = torch.randn(num_rows, HIDDEN, device="cuda").bfloat16()
    weight = torch.randn(_EXPERTS, HIDDEN, device="cuda") / HIDDEN**0.5
    bias = torch.randn(_EXPERTS, device="cuda") * 0.1
    return Work(
        shape=f"{num_rows} rows",
        calls=[lambda: router_topk(x, weight, bias, _CHOSEN, 2.0)],
        num_bytes=x.nbytes + weight.nbytes + num_rows * _CHOSEN * 12,
        num_flops=2 * num_rows * HIDDEN * _EXPERTS,
        note=eager_note([lambda: router_topk_ref(x, weight, bias, _CHOSEN, 2.0)]),
    )
