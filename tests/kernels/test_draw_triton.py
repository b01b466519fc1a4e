"""Draws in a fixed few launches, against the reference on the CPU."""

import struct
from collections.abc import Sequence

import pytest
import torch
from pdkv_kernels.draw import draw
from pdkv_kernels.draw_ref import ASKED, draw_ref, uniform
from pdkv_kernels.greedy_ref import NOT_FINITE, greedy_ref
from torch import Tensor

from tests.kernels.decode_case import on

MOST_TOP = 20
KINDS = [on(device, dtype) for device in ("cpu", "cuda") for dtype in (torch.float32, torch.bfloat16)]
# Infinities and NaN are meant, and numbers wrap around; numpy, which the interpreter computes with, warns of them.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def asked_of(rows: Sequence[tuple[float, float, int, int]]) -> Tensor:
    """Temperature, top_p, seed, how many likeliest; int64 [num_rows, ASKED]."""
    words = [struct.unpack("4q", struct.pack("2dQq", t, p, seed % (1 << 64), top)) for t, p, seed, top in rows]
    return torch.tensor(words, dtype=torch.int64).reshape(len(rows), ASKED)


def chosen_greedily(logits: Tensor) -> Tensor:
    chosen = torch.empty(3, logits.shape[0], dtype=torch.int64)
    greedy_ref(chosen, logits)
    return chosen


def drawn(logits: Tensor, asked: Tensor, positions: Tensor, device: str) -> tuple[Tensor, Tensor]:
    """What is chosen, and what is told of; -5 where nothing is."""
    chosen = chosen_greedily(logits).to(device)
    tops = torch.full((len(logits), 2, MOST_TOP), -5, device=device)
    draw(chosen, tops, logits.to(device), asked.to(device), positions.to(device))
    return chosen.cpu(), tops.cpu()


def check(logits: Tensor, asked: Tensor, device: str) -> Tensor:
    """Against the reference; the tokens."""
    positions = torch.arange(1000, 1000 + len(logits))
    wanted, wanted_tops = chosen_greedily(logits), torch.full((len(logits), 2, MOST_TOP), -5)
    draw_ref(wanted, wanted_tops, logits, asked, positions)
    found, tops = drawn(logits, asked, positions, device)
    assert torch.equal(found[:2], wanted[:2])
    finite = wanted[1] != NOT_FINITE
    values = [told[2, finite].view(torch.float64) for told in (found, wanted)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    assert torch.equal(tops[:, 0], wanted_tops[:, 0])
    is_told = tops[:, 1] != -5
    assert torch.equal(is_told, wanted_tops[:, 1] != -5)
    values = [told[:, 1][is_told].view(torch.float64) for told in (tops, wanted_tops)]
    torch.testing.assert_close(*values, rtol=1e-5, atol=1e-5)
    return found[1]


WAYS = [(1.0, 1.0), (0.0, 0.5), (0.7, 0.9), (1.5, 0.3), (2.0, 0.999), (1.0, 0.0), (1e-3, 0.9), (0.3, 1.0)]
DAMAGE = {8: torch.nan, 9: torch.inf, 11: -torch.inf}


@pytest.mark.parametrize(("device", "dtype"), KINDS)
@pytest.mark.parametrize("vocab", [1, 7, 5000])
def test_draws_equal_the_reference(device: str, dtype: torch.dtype, vocab: int):
    """Of every way to ask, in one part of a row and in two, beside rows that are not finite. Where there are
    equals, the reference tells any of them, so there nobody asks."""
    logits = 3 * torch.randn(12, vocab + 3, generator=torch.Generator().manual_seed(vocab))
    logits[1::3] += 40  # all likely ones of one sign, and not many numbers apart
    logits[2::3] -= 40
    logits = logits.to(dtype)[:, :vocab]
    for row, value in DAMAGE.items():
        logits[row, vocab * 2 // 3] = value
    num_tops = (3, 0, 0, 20, 0, 0) if dtype == torch.float32 else (0,)
    asked = asked_of([(*WAYS[row % 8], row - 3, num_tops[row % len(num_tops)]) for row in range(12)])
    tokens = check(logits, asked, device)
    assert tokens[[*DAMAGE]].tolist() == [NOT_FINITE] * 3


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_of_equals_the_first_are_in_the_nucleus_and_are_told_of(device: str, dtype: torch.dtype):
    """Over two parts; zeros of either sign are equal."""
    logits = torch.zeros(9, 5000, dtype=dtype)
    logits[:, ::3] = -0.0
    logits[:, 1::5] = -1.0
    tokens = check(
        logits, asked_of([(1.0, share, seed, 0) for share in (0.3, 0.85, 0.95) for seed in range(3)]), device
    )
    assert len({*tokens.tolist()}) > 5
    asked = asked_of([(0.0, 1.0, 0, 20)])
    _, tops = drawn(logits[:1], asked, torch.zeros(1, dtype=torch.int64), device)
    assert tops[0, 0].tolist() == [token for token in range(40) if token % 5 != 1][:20]


@pytest.mark.parametrize(("device", "dtype"), KINDS[::2])
def test_numbers_are_philoxs_of_any_seed_and_position(device: str, dtype: torch.dtype):
    """Of tokens that are equally likely the one drawn is the number's first bits."""
    seeds, positions = [0, 1, -1, 1 << 63, 0xDEADBEEF << 20], [0, 1, 4095, 1 << 20, (1 << 40) + 7]
    asked = asked_of([(1.0, 1.0, seed, 0) for seed in seeds])
    found, _ = drawn(torch.zeros(5, 4096, dtype=dtype), asked, torch.tensor(positions) - 1, device)
    expected = [int(4096 * uniform(seed, position)) for seed, position in zip(seeds, positions, strict=True)]
    assert found[1].tolist() == expected


@pytest.mark.parametrize(("device", "dtype"), KINDS)
def test_a_row_hangs_on_no_other(device: str, dtype: torch.dtype):
    """Bit for bit, whatever its place."""
    logits = (3 * torch.randn(4, 5000, generator=torch.Generator().manual_seed(3))).to(dtype)
    asked = asked_of([(0.9, 0.9, 1, 5), (0.0, 1.0, 2, 2), (1.2, 1.0, 3, 0), (0.4, 0.5, 4, 0)])
    positions = torch.arange(4)
    chosen, tops = drawn(logits, asked, positions, device)
    turned, turned_tops = drawn(logits.flip(0), asked.flip(0), positions.flip(0), device)
    assert torch.equal(turned.flip(1), chosen)
    assert torch.equal(turned_tops.flip(0), tops)
    alone, alone_tops = drawn(logits[2:3], asked[2:3], positions[2:3], device)
    assert torch.equal(alone, chosen[:, 2:3])
    assert torch.equal(alone_tops, tops[2:3])
