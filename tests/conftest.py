"""Torch's own threads, before anything imports torch: several test processes share the cores."""

import os
from pathlib import Path

import pytest

# Threads of torch that spin while they wait make a small model 20 times slower on a busy machine.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch  # noqa: E402

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. Triton reads this when it is imported itself, for its own library too, and
    # any test module may be the first to do so.
    os.environ["TRITON_INTERPRET"] = "1"

E2E = Path(__file__).parent / "e2e"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What shares fixtures runs in one process: each file, and all end-to-end tests, which take longest and so begin
    first."""
    for item in items:
        is_e2e = E2E in item.path.parents
        item.add_marker(pytest.mark.xdist_group("e2e" if is_e2e else str(item.path)))
    items.sort(key=lambda item: E2E not in item.path.parents)
