"""The model on a GPU against references on a CPU: float32 under the equality rule, bfloat16 within its precision."""

import numpy as np
import pytest
import torch

from pdkv.verify.equality import compare_logits
from tests.gpu.models import cpu_model, gpu_model, small_config
from tests.m3.paged_run import PagedRun

NUM_TOKENS = 1500
"""Twelve blocks, of which four are chosen."""


def _logits(run: PagedRun) -> np.ndarray:
    """Prefill in ragged chunks, three rows at a time, then one by one: [num_rows, vocab]."""
    tokens = np.random.default_rng(5).integers(3, 384, NUM_TOKENS).tolist()
    rows = []
    for begin, end in ((0, 700), (700, 1401), (1401, NUM_TOKENS - 9)):
        rows.append(run.feed(tokens[begin:end], list(range(0, end - begin, 97))))
    for begin in range(NUM_TOKENS - 9, NUM_TOKENS - 3, 3):
        rows.append(run.feed(tokens[begin : begin + 3], [0, 1, 2]))
    rows += [run.feed(tokens[i : i + 1]) for i in range(NUM_TOKENS - 3, NUM_TOKENS)]
    return torch.cat([row.cpu() for row in rows]).numpy()


@pytest.mark.parametrize("stored", [("float32", "float32"), ("fp8", "fp8")])
def test_float32_is_exact(stored: tuple[str, str]) -> None:
    config = small_config("float32")
    wanted = _logits(PagedRun(cpu_model(config), NUM_TOKENS, 1, *stored))
    found = _logits(PagedRun(gpu_model(config), NUM_TOKENS, 1, *stored))
    if stored[0] == "float32":
        verdict = compare_logits(found, wanted)
        assert verdict.equal, verdict
    else:  # sums of another order now and then round to the neighbouring fp8 number
        assert np.linalg.norm(found - wanted) < 2e-2 * np.linalg.norm(wanted)


@pytest.mark.parametrize("stored", ["bfloat16", "fp8", "fp8_unit", "fp8_e5m2"])
def test_bfloat16_stays_within_its_precision(stored: str) -> None:
    config = small_config("bfloat16")
    index = "bfloat16" if stored in ("bfloat16", "fp8_e5m2") else "fp8"
    wanted = _logits(PagedRun(cpu_model(config), NUM_TOKENS, 1, stored, index))
    found = _logits(PagedRun(gpu_model(config), NUM_TOKENS, 1, stored, index))
    assert np.isfinite(found).all()
    error = np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)  # [num_rows]
    # A row may differ by a near tie between blocks or experts; fp8 rounds another bfloat16 to its neighbour.
    assert np.median(error) < (3e-2 if stored == "bfloat16" else 8e-2), error
