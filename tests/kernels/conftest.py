"""Every test here draws from its own fixed random numbers; without a GPU, kernels run in Triton's interpreter."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any test imports one


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
