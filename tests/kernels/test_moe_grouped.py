"""Grouped experts against the loop over experts, on the CPU here and on a GPU where there is one."""

import pytest
import torch
from pdkv_kernels.moe_grouped import can_group, moe_grouped
from pdkv_kernels.moe_ref import moe_ref

ACTIVATION = (1.702, 7.0, 1.0)
NUM_EXPERTS, HIDDEN, SIZE, TOP = 8, 64, 48, 3

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none")
# Behind the groups lies garbage, and numpy, which the interpreter computes with, warns of it.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]


class Case:
    def __init__(self, dtype: torch.dtype, device: str, num_rows: int = 37) -> None:
        make = torch.Generator().manual_seed(num_rows)
        x = torch.randn(num_rows, HIDDEN, generator=make)
        gate_up = torch.randn(NUM_EXPERTS, 2 * SIZE, HIDDEN, generator=make) / HIDDEN**0.5
        down = torch.randn(NUM_EXPERTS, HIDDEN, SIZE, generator=make) / SIZE**0.5
        self.x, self.gate_up, self.down = (t.to(device, dtype) for t in (x, gate_up, down))
        # Nobody chooses expert 5, and everybody expert 2.
        choice = torch.stack([torch.randperm(NUM_EXPERTS - 2, generator=make)[: TOP - 1] for _ in range(num_rows)])
        others = torch.tensor([0, 1, 3, 4, 6, 7])[choice]
        self.ids = torch.cat((others, torch.full((num_rows, 1), 2)), dim=1).to(device)
        self.weights = torch.rand(num_rows, TOP, generator=make).to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gives_what_the_loop_gives(dtype: torch.dtype, device: str) -> None:
    case = Case(dtype, device)
    wanted = moe_ref(case.x, case.ids, case.weights, case.gate_up, case.down, ACTIVATION)
    found = moe_grouped(case.x, case.ids, case.weights, case.gate_up, case.down, ACTIVATION)
    torch.testing.assert_close(found, wanted, atol=1e-6 if dtype == torch.float32 else 2e-2, rtol=1e-2)


@pytest.mark.parametrize("device", DEVICES)
def test_experts_of_other_ranks_add_nothing_whatever_lies_behind_the_groups(device: str) -> None:
    case = Case(torch.bfloat16, device)
    whole = moe_grouped(case.x, case.ids, case.weights, case.gate_up, case.down, ACTIVATION)
    parts = torch.zeros_like(whole)
    for first in (0, 3, 6):
        mine = slice(first, first + 3)
        poison = torch.full((4096,), torch.nan, device=device)  # freed: what the next allocations find
        del poison
        parts += moe_grouped(case.x, case.ids, case.weights, case.gate_up[mine], case.down[mine], ACTIVATION, first)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_refuses_widths_that_are_no_multiples_of_16_bytes() -> None:
    case = Case(torch.bfloat16, "cpu")
    assert can_group(case.x, case.gate_up, case.down)
    assert not can_group(case.x, case.gate_up[:, :-1], case.down)
