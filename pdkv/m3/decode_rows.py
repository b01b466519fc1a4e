"""Which row of a decode step's buffers each sequence has: the same from step to step, so little is written anew."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Onward, Run, staying

END, START, BEHIND, GROWS, TOKENS = 0, 1, 2, 3, 4
"""Columns of a sequence's row of numbers: where its tokens end, from which position on they are stored, the row of the
step before whose choice is its last token (-1: it is among its tokens), 1 (0 in the row of no sequence), its tokens.
With every step the device takes its own copy one token further: the first two grow, the third becomes the row itself.
"""

Rows = np.ndarray[tuple[int], np.dtype[np.int64]]
Numbers = np.ndarray[tuple[int, int], np.dtype[np.int32]]
Pages = tuple[int, ...]


class TableChanges(NamedTuple):
    """What of the page tables is another than it was."""

    moved: Sequence[tuple[int, int]]
    """Rows whose content is now that of another one, which is none of these: to, from."""
    written: Sequence[tuple[int, Pages]]
    """Rows, and what is in them now."""


class DecodeRows:
    """Rows of sequences in steps that follow one another, and the page tables in them. Owned by the engine thread.

    Rows of a step are its first, without a gap. Whoever stays keeps its row, unless it is beyond the step's last.
    """

    def __init__(self, most: int) -> None:
        """``most``: sequences of a step."""
        self._ids: list[RequestId] = []
        self.index: Rows = np.zeros(0, dtype=np.int64)
        """The row of each run of the latest step."""
        self._lines: Numbers = np.zeros((0, TOKENS), dtype=np.int32)
        """What each run was told when something was told last, but its tokens."""
        self._num_silent = 0
        """Steps since then."""
        self._pages: list[Pages] = [() for _ in range(most)]

    def enter(self, runs: Sequence[Run], numbers: Numbers, query_len: int) -> TableChanges:
        """Write what a step is told of ``runs`` but their pages.

        A run of fewer tokens than ``query_len`` has them last: rows before them repeat what is stored already.
        """
        before, self._num_silent = self.index, 0
        self._place(runs)
        lengths = [len(run.tokens) for run in runs]
        begin = TOKENS + query_len
        if min(lengths) == query_len:
            numbers[self.index, TOKENS:begin] = [run.tokens for run in runs]
        else:
            for row, run in zip(self.index.tolist(), runs, strict=True):
                numbers[row, begin - len(run.tokens) : begin] = run.tokens
        self._lines = _lines(runs, lengths)
        self._lines[:, BEHIND] = [-1 if run.behind is None else before[run.behind] for run in runs]
        numbers[self.index, :TOKENS] = self._lines
        return TableChanges((), self._written(self.index.tolist(), runs))

    def go_on(self, step: Onward, numbers: Numbers) -> TableChanges | None:
        """Write what the step behind the latest is told, in which whoever stays takes its token from there. None: it is
        told nothing, since all go on and the device has their numbers."""
        self._num_silent += 1
        if not (step.left or step.joined):
            return None
        lines = self._lines
        lines[:, :BEHIND] += self._num_silent
        lines[:, BEHIND] = self.index
        self._num_silent = 0
        changes = self._change(step)
        if step.joined:
            numbers[self.index[-len(step.joined) :], TOKENS] = [run.tokens[0] for run in step.joined]
        numbers[self.index, :TOKENS] = self._lines
        return changes

    def _change(self, step: Onward) -> TableChanges:
        """Let some leave, and others join behind those that stay."""
        stays = np.ones(len(self._ids), dtype=bool)
        stays[list(step.left)] = False
        rows, ids = self.index[stays], staying(self._ids, step.left)
        count = len(ids) + len(step.joined)
        is_free = np.ones(max(count, len(self._ids)), dtype=bool)
        is_free[rows] = False
        free = is_free[:count].nonzero()[0]
        beyond = (rows >= count).nonzero()[0]
        new = free[len(beyond) :]
        moved = list(zip(free.tolist(), rows[beyond].tolist(), strict=False))
        rows[beyond] = free[: len(beyond)]
        for to, source in moved:
            self._pages[to] = self._pages[source]
        self._ids = ids + [run.id for run in step.joined]
        self.index = np.concatenate((rows, new))
        self._lines = np.concatenate((self._lines[stays], _lines(step.joined, 1)))
        return TableChanges(moved, self._written(new.tolist(), step.joined))

    def _written(self, rows: Sequence[int], runs: Sequence[Run]) -> list[tuple[int, Pages]]:
        known, written = self._pages, []
        for row, run in zip(rows, runs, strict=True):
            if run.pages is not known[row] and run.pages != known[row]:
                written.append((row, run.pages))
            known[row] = run.pages
        return written

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


def _lines(runs: Sequence[Run], lengths: Sequence[int] | int) -> Numbers:
    """Of runs of so many tokens, all of which are known."""
    lines = np.full((len(runs), TOKENS), -1, dtype=np.int32)
    lines[:, GROWS] = 1
    lines[:, START] = [run.start for run in runs]
    lines[:, END] = lines[:, START] + lengths
    return lines
