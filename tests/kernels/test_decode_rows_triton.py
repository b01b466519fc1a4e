"""Rows of decode steps in two launches, against the reference: whatever the host says of some, and of others before."""

import dataclasses

import pytest
import torch
from pdkv_kernels.decode_rows import begin_rows, end_rows, retell_rows
from pdkv_kernels.decode_rows_ref import (
    PAGES,
    TOKENS,
    RowBuffers,
    RowInputs,
    begin_rows_ref,
    end_rows_ref,
    retell_rows_ref,
)
from pdkv_kernels.draw_ref import ASKED, NUM_TOP, TEMPERATURE

from tests.kernels.decode_case import on

MOST, LONGEST, MAX_BLOCKS = 37, 4, 1100
MOST_TOP = 20
KINDS = [on(device, torch.int32) for device in ("cpu", "cuda")]


def buffers(generator: torch.Generator) -> RowBuffers:
    def numbers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.randint(0, 1 << 20, shape, generator=generator, dtype=dtype)

    lines = numbers(2, MOST, PAGES)
    lines[..., 2] %= MOST
    lines[..., 3] = torch.randint(0, 2, (2, MOST), generator=generator)
    return RowBuffers(
        said_at=torch.zeros(2, MOST, dtype=torch.int64),
        said=numbers(2, MOST, TOKENS + LONGEST),
        said_pages=numbers(2, MOST, MAX_BLOCKS),
        said_asked=numbers(2, MOST, ASKED, dtype=torch.int64),
        step=torch.ones(1, dtype=torch.int64),
        numbers=lines,
        asked=numbers(2, MOST, ASKED, dtype=torch.int64),
        tables=numbers(MOST, MAX_BLOCKS),
        last=numbers(MOST, dtype=torch.int64),
        told=numbers(2, 2, MOST * LONGEST, dtype=torch.int64),
        told_tops=numbers(2, MOST, 2, MOST_TOP, dtype=torch.int64),
    )


def on_device(all_of_it: RowBuffers, device: str) -> RowBuffers:
    """A copy, the host's part pinned where the device is another."""
    host = {"said_at", "said", "said_pages", "said_asked", "told", "told_tops"}
    copies = {}
    for field in dataclasses.fields(all_of_it):
        tensor = getattr(all_of_it, field.name).clone()
        is_pinned = device == "cuda" and field.name in host
        copies[field.name] = (
            tensor.pin_memory() if is_pinned else tensor.to(device if field.name not in host else "cpu")
        )
    return RowBuffers(**copies)


def say(sides: list[RowBuffers], step: int, batch: int, generator: torch.Generator) -> None:
    """Something new of three rows: one with pages, one without a word of them, one that is now what the last was."""
    half = step % 2
    new, kept, moved = torch.randperm(batch - 1, generator=generator)[:3].tolist()
    line = torch.randint(0, 1 << 20, (3, TOKENS + LONGEST), generator=generator, dtype=torch.int32)
    line[:, 2] = torch.tensor([-1, 3, 0])
    line[:, 3] = torch.tensor([1, 0, 1])
    line[:, PAGES] = torch.tensor([int(torch.randint(1, MAX_BLOCKS, (1,), generator=generator)), 0, -batch])
    for side in sides:
        for row, words in zip((new, kept, moved), line, strict=True):
            side.said[half, row] = words
            side.said_at[half, row] = step


@pytest.mark.parametrize(("device", "_"), KINDS)
@pytest.mark.parametrize("query_len", [1, 3])
def test_rows_of_step_after_step_equal_the_reference(device: str, _: torch.dtype, query_len: int):
    generator = torch.Generator().manual_seed(query_len)
    wanted = buffers(generator)
    found = on_device(wanted, device)
    for step, batch in enumerate((MOST, MOST, 9, 9, 30, MOST), start=1):
        say([wanted, found], step, batch, generator)
        inputs, expected = begin_rows(found, batch, query_len), begin_rows_ref(wanted, batch, query_len)
        for field in dataclasses.fields(RowInputs):
            assert torch.equal(getattr(inputs, field.name).cpu(), getattr(expected, field.name)), (step, field.name)
        chosen = torch.randint(0, 1 << 40, (3, batch * query_len), generator=generator)
        end_rows(found, chosen.to(device), batch, query_len)
        end_rows_ref(wanted, chosen, batch, query_len)
        if query_len == 1:
            tops = torch.randint(0, 1 << 40, (batch, 2, MOST_TOP), generator=generator)
            asked = torch.zeros(batch, ASKED, dtype=torch.int64)
            asked[::3, TEMPERATURE] = 1  # of a float64 the smallest
            asked[::2, NUM_TOP] = 5
            chosen = chosen + 1
            retell_rows(found, chosen.to(device), tops.to(device), asked.to(device))
            retell_rows_ref(wanted, chosen, tops, asked)
        for field in dataclasses.fields(RowBuffers):
            assert torch.equal(getattr(found, field.name).cpu(), getattr(wanted, field.name)), (step, field.name)
