"""Which row of a decode step's buffers each sequence has: the same from step to step, so little is written anew."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from pdkv_kernels.decode_rows_ref import BEHIND, END, GROWS, PAGES, START, TOKENS

from pdkv.m3.logprobs import MAX_TOP
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Onward, Run, Seating, seated, seating

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
Numbers = np.ndarray[tuple[int, int], np.dtype[np.int32]]
Words = np.ndarray[tuple[int, int], np.dtype[np.int64]]
Pages = tuple[int, ...]

_NOBODY = np.array([0, 0, -1, 0, 0], dtype=np.int32)
"""What is said of the row of no sequence: nothing before it, nothing of it stored."""


class Said(NamedTuple):
    """What the host says to one step, row by row; the device reads it when it comes to that step."""

    at: Rows  # [most]: the step, by its number, to which something is said of the row
    lines: Numbers  # int32 [most, TOKENS + longest], columns as in ``pdkv_kernels.decode_rows_ref``
    pages: Numbers  # int32 [most, max_blocks]
    asked: Words  # int64 [most, ASKED], columns as in ``pdkv_kernels.draw_ref``


class DecodeRows:
    """Rows of sequences in steps that follow one another, and the page tables in them. Owned by the engine thread.

    Rows of a step are its first, without a gap; rows behind them, up to its shape's size, are nobody's. Whoever stays
    keeps its row, unless it is beyond the step's last. The device takes every row one token further by itself, so it is
    told of those that change.
    """

    def __init__(self, most: int, most_top: int = MAX_TOP) -> None:
        """``most``: sequences of a step; ``most_top``: likeliest tokens that there are to tell of any."""
        self._most_top = most_top
        self._ids: list[RequestId] = []
        self.index: Rows = np.zeros(0, dtype=np.int64)
        """The row of each run of the latest step. Not written to again: whoever has it may keep it."""
        self.is_in_order = True
        """Each run's row is its place."""
        self._in_order: Rows = np.arange(most)
        self._batch = 0
        """Rows of the latest step's shape."""
        self._pages: list[Pages] = [() for _ in range(most)]
        self.counts: Rows = np.zeros(most, dtype=np.int64)
        """By row: how many likeliest tokens are asked for. Of rows that are nobody's none."""
        self._draws = np.zeros(most, dtype=bool)
        """By row: more than a greedy choice is asked for."""
        self.draws = False
        """Of some row of the latest step."""

    @property
    def count(self) -> int:
        """Sequences of the latest step."""
        return len(self._ids)

    def enter(self, runs: Sequence[Run], said: Said, number: int, shape: tuple[int, int]) -> None:
        """Say all of ``runs`` to the step of that number; ``shape``: its sequences, and rows of each.

        A run of fewer tokens than the shape's rows has them last: rows before them repeat what is stored already.
        """
        batch, query_len = shape
        count_before = self.count
        self._place(runs)
        index, lines = self.index, said.lines
        lengths = [len(run.tokens) for run in runs]
        starts = np.array([run.start for run in runs], dtype=np.int32)
        lines[index, START] = starts
        lines[index, END] = starts + np.array(lengths, dtype=np.int32)
        lines[index, BEHIND], lines[index, GROWS], lines[index, PAGES] = -1, 1, 0
        end = TOKENS + query_len
        if min(lengths) == query_len:
            lines[index, TOKENS:end] = [run.tokens for run in runs]
        else:
            for row, run in zip(index.tolist(), runs, strict=True):
                lines[row, end - len(run.tokens) : end] = run.tokens
        said.at[: len(runs)] = number
        for row, run in zip(index.tolist(), runs, strict=True):
            self._say_pages(row, run.pages, said)
            self._ask(row, run, said)
        self._empty(said, number, batch, count_before)

    def go_on(self, step: Onward, said: Said, number: int, batch: int) -> None:
        """Say to the step behind the latest, in which whoever stays takes its token from there, who comes and who goes.

        Nothing where all go on: then the device knows."""
        count, joined = self.count, step.joined
        seats = seating(count, step.left, len(joined))
        self._ids = seated(self._ids, seats, [run.id for run in joined])
        if self.is_in_order:
            rows, moved = seats.joined, seats.moved
            self.index = self._in_order[: seats.num_places]
        else:
            rows, moved = self._give_rows(step, seats)
        for row, run in zip(rows, joined, strict=True):
            self._say(row, run, said, number)
        for to, source in moved:
            self._move(source, to, said, number)
        self._empty(said, number, batch, count)

    def _give_rows(self, step: Onward, seats: Seating) -> tuple[list[int], list[tuple[int, int]]]:
        """Where places are no rows: the rows of those that join, in order, and who goes on in another one: to, from."""
        count, num_joined = len(self.index), len(step.joined)
        index = np.concatenate((self.index, np.arange(count, max(count, seats.num_places))))
        free = sorted(index[[*step.left]].tolist()) + list(range(count, seats.num_places))
        index[seats.joined] = free[:num_joined]
        for to, source in seats.moved:
            index[to] = index[source]
        self.index = index[: seats.num_places]
        beyond = (self.index >= seats.num_places).nonzero()[0]
        moved = list(zip(free[num_joined:], self.index[beyond].tolist(), strict=False))
        self.index[beyond] = [to for to, _ in moved]
        return free[:num_joined], moved

    def _say(self, row: int, run: Run, said: Said, number: int) -> None:
        """A run of one token that is known."""
        (token,) = run.tokens
        said.lines[row, : TOKENS + 1] = (run.end, run.start, -1, 1, 0, token)
        said.at[row] = number
        self._say_pages(row, run.pages, said)
        self._ask(row, run, said)

    def _say_pages(self, row: int, pages: Pages, said: Said) -> None:
        if pages is not self._pages[row] and pages != self._pages[row]:
            said.pages[row, : len(pages)] = pages
            said.lines[row, PAGES] = len(pages)
        self._pages[row] = pages

    def _ask(self, row: int, run: Run, said: Said) -> None:
        sampling = run.sampling
        assert sampling is not None, "a decode step chooses behind every run"
        said.asked[row] = sampling.words(run.num_top)
        self.counts[row] = min(run.num_top, self._most_top)
        self._draws[row] = run.num_top > 0 or sampling.temperature > 0

    def _move(self, source: int, to: int, said: Said, number: int) -> None:
        said.lines[to, PAGES] = -1 - source
        said.at[to] = number
        self._pages[to] = self._pages[source]
        self.counts[to], self._draws[to] = self.counts[source], self._draws[source]

    def _empty(self, said: Said, number: int, batch: int, count_before: int) -> None:
        """Say that rows are nobody's: those that were somebody's, and those that the last step's shape did not have."""
        for begin, end in ((self.count, min(count_before, batch)), (max(self.count, self._batch), batch)):
            if begin < end:
                said.lines[begin:end, :TOKENS] = _NOBODY
                said.lines[begin:end, TOKENS:] = 0
                said.asked[begin:end] = 0
                said.at[begin:end] = number
        self._batch = batch
        self.counts[self.count :], self._draws[self.count :] = 0, False
        self.draws = b"\1" in self._draws.tobytes()  # quicker than to ask numpy whether there is any

    def _place(self, runs: Sequence[Run]) -> None:
        ids = [run.id for run in runs]
        if ids == self._ids:
            return
        count = len(ids)
        known = dict(zip(self._ids, self.index.tolist(), strict=True))
        places = [known.get(request, count) for request in ids]
        taken = {row for row in places if row < count}
        free = iter([row for row in range(count) if row not in taken])
        self._ids = ids
        self.index = np.array([row if row < count else next(free) for row in places], dtype=np.int64)
        self.is_in_order = bool((self.index == self._in_order[:count]).all())
