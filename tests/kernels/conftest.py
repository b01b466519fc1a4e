"""Every test here draws from its own fixed random numbers."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    from tests.kernels.interpreter import hasten

    hasten()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
