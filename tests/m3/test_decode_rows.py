"""Rows of decode steps, whoever comes and goes: what the device reads there is what each sequence's step is."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from pdkv_kernels.decode_rows_ref import BEHIND, PAGES, TOKENS, RowBuffers, begin_rows_ref, end_rows_ref
from pdkv_kernels.draw_ref import ASKED

from pdkv.m3.decode_rows import DecodeRows, Said
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Onward, Run, seated, seating
from pdkv.m3.sampling import SamplingParams

MOST, MAX_BLOCKS = 6, 4
SHAPES = (2, 4, MOST)
JUNK = -7


class Device:
    """Steps over the buffers of a device, each of which chooses 1000 more than the token of a row."""

    def __init__(self) -> None:
        self.rows = DecodeRows(MOST)
        self.buffers = RowBuffers(
            said_at=torch.full((2, MOST), -1),
            said=torch.full((2, MOST, TOKENS + 1), JUNK, dtype=torch.int32),
            said_pages=torch.full((2, MOST, MAX_BLOCKS), JUNK, dtype=torch.int32),
            said_asked=torch.full((2, MOST, ASKED), JUNK),
            step=torch.zeros(1, dtype=torch.int64),
            numbers=torch.zeros(2, MOST, PAGES, dtype=torch.int32),
            asked=torch.zeros(2, MOST, ASKED, dtype=torch.int64),
            tables=torch.full((MOST, MAX_BLOCKS), JUNK, dtype=torch.int32),
            last=torch.full((MOST,), JUNK),
            told=torch.zeros(2, 2, MOST, dtype=torch.int64),
            told_tops=torch.zeros(2, MOST, 2, 0, dtype=torch.int64),
        )
        self.buffers.numbers[:, :, BEHIND] = -1
        self.num_steps = 0

    @property
    def said(self) -> Said:
        """The half of the next step, of which nothing may be needed that is left from the step before the last."""
        half = self.num_steps % 2
        self.buffers.said[half] = JUNK
        self.buffers.said_pages[half] = JUNK
        self.buffers.said_asked[half] = JUNK
        return Said(*(tensor[half].numpy() for tensor in (
            self.buffers.said_at, self.buffers.said, self.buffers.said_pages, self.buffers.said_asked
        )))  # fmt: skip

    def enter(self, runs: list[Run]) -> None:
        self.rows.enter(runs, self.said, self.num_steps, (shape_of(len(runs)), 1))

    def go_on(self, step: Onward, count: int) -> None:
        if step != Onward():
            self.rows.go_on(step, self.said, self.num_steps, shape_of(count))

    def compute(self, now: list[int], starts: dict[int, int], tokens: dict[int, int]) -> None:
        """``now``: sequences by place, of each of which a token is to be at a position."""
        batch = shape_of(len(now))
        index = self.rows.index.tolist()
        assert sorted(index) == list(range(len(now)))
        found = begin_rows_ref(self.buffers, batch, 1)
        for row, number in zip(index, now, strict=True):
            assert found.positions[row] == found.context_lens[row] == found.stored_from[row] == starts[number]
            assert found.token_ids[row] == tokens[number]
            assert found.asked[row].tolist() == list(sampling_of(number).words(number % 3))
            assert self.rows.counts[row] == number % 3
            assert self.buffers.tables[row, : len(pages_of(number))].tolist() == list(pages_of(number))
        assert (found.positions[len(now) :] < 0).all(), "rows of nobody store nothing"
        assert not found.asked[len(now) :].any(), "and draw nothing"
        assert self.rows.draws == any(number % 2 or number % 3 for number in now)
        chosen = found.token_ids + 1000
        end_rows_ref(self.buffers, torch.stack((chosen, chosen, chosen)), batch, 1)
        assert self.buffers.told[self.num_steps % 2, 0, index].tolist() == [tokens[number] + 1000 for number in now]
        self.num_steps += 1


def shape_of(count: int) -> int:
    return next(size for size in SHAPES if size >= count)


def pages_of(number: int) -> tuple[int, ...]:
    return tuple(range(10 * number, 10 * number + 1 + number % MAX_BLOCKS))


def sampling_of(number: int) -> SamplingParams:
    """Every other one draws."""
    return SamplingParams(temperature=number % 2, seed=number - 3, top_p=1 / (1 + number))


def run(number: int, start: int, token: int | None = None) -> Run:
    """Its token is its number, unless it is another."""
    id_ = RequestId(b"%d" % number)
    return Run(
        id=id_,
        tokens=(number if token is None else token,),
        start=start,
        pages=pages_of(number),
        sampling=sampling_of(number),
        num_top=number % 3,
    )


steps = st.lists(st.tuples(st.sets(st.integers(0, MOST - 1)), st.integers(0, MOST), st.booleans()), max_size=16)
"""Places that leave where there are such, how many join where there is room, whether the step says all of itself."""


@given(first=st.integers(1, MOST), steps=steps)
def test_whoever_stays_is_found_and_whoever_joins_has_all_it_needs(
    first: int, steps: list[tuple[set[int], int, bool]]
) -> None:
    device = Device()
    now = list(range(first))
    starts, tokens = {number: 5 * number for number in now}, {number: number for number in now}
    num_known = first
    device.enter([run(number, starts[number]) for number in now])
    device.compute(now, starts, tokens)
    for leaving, joining, says_all in steps:
        left = sorted(place for place in leaving if place < len(now))
        new = list(range(num_known, num_known + min(joining, MOST - len(now) + len(left))))
        num_known += len(new)
        if len(left) == len(now) and not new:
            return
        starts = {number: start + 1 for number, start in starts.items()} | {number: 7 * number for number in new}
        tokens = {number: token + 1000 for number, token in tokens.items()} | {number: number for number in new}
        if says_all:
            now = [number for place, number in enumerate(now) if place not in left][::-1] + new
            device.enter([run(number, starts[number], tokens[number]) for number in now])
        else:
            now = seated(now, seating(len(now), left, len(new)), new)
            device.go_on(Onward(tuple(left), tuple(run(number, starts[number]) for number in new)), len(now))
        device.compute(now, starts, tokens)


def test_nothing_is_said_of_whoever_stays() -> None:
    device = Device()
    device.enter([run(number, 3) for number in range(MOST)])
    assert device.rows.index.tolist() == list(range(MOST))
    shapes = {"lines": (MOST, TOKENS + 1), "pages": (MOST, MAX_BLOCKS)}
    numbers = {name: np.zeros(shape, np.int32) for name, shape in shapes.items()}
    said = Said(np.full(MOST, -1), **numbers, asked=np.zeros((MOST, ASKED), np.int64))
    device.rows.go_on(Onward(left=(1,), joined=(run(7, 9),)), said, 1, MOST)
    assert said.at.tolist() == [-1, 1, -1, -1, -1, -1], "who joins has the row of the one that has left"
    assert said.pages[1].tolist() == list(pages_of(7))
    device.rows.go_on(Onward(left=(0,)), said, 2, MOST)
    assert said.at.tolist() == [2, 1, -1, -1, -1, 2], "the last takes the row of the one that left, its own is nobody's"
    assert said.lines[0, PAGES] == -1 - (MOST - 1)
    assert device.rows.index.tolist() == list(range(MOST - 1))
