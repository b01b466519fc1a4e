"""Greedy choices in two launches, against the reference on the CPU."""

import pytest
import torch
from pdkv_kernels.greedy import greedy
from pdkv_kernels.greedy_ref import NOT_FINITE, greedy_ref

from tests.kernels.decode_case import on

KINDS = [on(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.float32, torch.bfloat16)]
# Infinities and NaN are meant; numpy, which the interpreter computes with, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("vocab", [1, 7, 4096, 9000])
def test_choices_equal_the_reference(device: str, dtype: torch.dtype, vocab: int):
    """Of equals in one part of a row and in several; of rows that are not finite; into a part of a wider tensor."""
    logits = torch.randn(8, vocab + 3, generator=torch.Generator().manual_seed(vocab)).to(dtype)[:, :vocab]
    logits[1, vocab // 2 :] = 9.0
    logits[2] = -3.0
    logits[3, [0, vocab - 1]] = 50.0
    for row, value in ((4, torch.nan), (5, torch.inf), (6, -torch.inf)):
        logits[row, vocab * 2 // 3] = value
    expected = torch.zeros(3, 8, dtype=torch.int64)
    greedy_ref(expected, logits)
    out = torch.full((3, 12), 77, device=device)
    greedy(out[:, 2:10], logits.to(device))
    found = out.cpu()
    assert (found[:, :2] == 77).all()
    assert (found[:, 10:] == 77).all()
    found = found[:, 2:10]
    assert torch.equal(found[1], expected[1])
    assert found[1, 4:7].tolist() == [NOT_FINITE] * 3
    assert ((found[0] >= 0) & (found[0] < vocab)).all(), "the next step looks up what was chosen, whatever it is"
    finite = expected[1] != NOT_FINITE
    assert torch.equal(found[0, finite], expected[0, finite])
    logprobs = [told[2].contiguous().view(torch.float64)[finite] for told in (found, expected)]
    torch.testing.assert_close(*logprobs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_a_row_hangs_on_no_other(device: str, dtype: torch.dtype):
    logits = torch.randn(5, 9000).to(device, dtype)
    together, alone = (torch.zeros(3, 5, dtype=torch.int64, device=device) for _ in range(2))
    greedy(together, logits)
    for row in range(5):
        greedy(alone[:, row : row + 1], logits[row : row + 1])
    assert torch.equal(together, alone)
