"""Which row of a decode step's buffers each sequence has: the same from step to step, so little is written anew."""

from collections.abc import Iterable, Sequence

import numpy as np

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Onward, Run

END, START, BEHIND, TOKENS = 0, 1, 2, 3
"""Columns of a sequence's row of numbers: where its tokens end, from which position on they are stored, the row of the
step before whose choice is its last token (-1: it is among its tokens), and its tokens."""

Numbers = np.ndarray[tuple[int, int], np.dtype[np.int32]]
Pages = tuple[int, ...]


class DecodeRows:
    """Rows of sequences in steps that follow one another, and the page tables in them. Owned by the engine thread.

    Rows of a step are its first, without a gap. Whoever stays keeps its row, unless it is beyond the step's last.
    """

    def __init__(self, most: int) -> None:
        """``most``: sequences of a step."""
        self._ids: list[RequestId] = []
        self.places: list[int] = []
        """The row of each run of the latest step."""
        self.index: np.ndarray[tuple[int], np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)
        """The same."""
        self._lines: Numbers = np.zeros((0, TOKENS), dtype=np.int32)
        """What each run was told, but its tokens."""
        self._pages: list[Pages] = [() for _ in range(most)]

    def enter(self, runs: Sequence[Run], numbers: Numbers, query_len: int) -> None:
        """Write what a step is told of ``runs`` but their pages.

        A run of fewer tokens than ``query_len`` has them last: rows before them repeat what is stored already.
        """
        before = self.places
        self._place(runs)
        lengths = [len(run.tokens) for run in runs]
        begin = TOKENS + query_len
        if min(lengths) == query_len:
            numbers[self.index, TOKENS:begin] = [run.tokens for run in runs]
        else:
            for row, run in zip(self.places, runs, strict=True):
                numbers[row, begin - len(run.tokens) : begin] = run.tokens
        self._lines = np.empty((len(runs), TOKENS), dtype=np.int32)
        self._lines[:, START] = [run.start for run in runs]
        self._lines[:, END] = self._lines[:, START] + lengths
        self._lines[:, BEHIND] = [-1 if run.behind is None else before[run.behind] for run in runs]
        numbers[self.index, :TOKENS] = self._lines

    def go_on(self, numbers: Numbers) -> None:
        """Write what the step behind the latest is told, which takes each one's token from there."""
        self._lines[:, :BEHIND] += 1
        self._lines[:, BEHIND] = self.index
        numbers[self.index, :TOKENS] = self._lines

    def new_pages(self, step: Sequence[Run] | Onward) -> list[tuple[int, Pages]]:
        """Rows whose page table is another than it was, and what it is now. Asked once a step, after the others."""
        told: Iterable[tuple[int, Pages]]
        if isinstance(step, Onward):
            told = [(self.places[place], pages) for place, pages in step.new_pages]
        else:
            told = zip(self.places, [run.pages for run in step], strict=True)
        known, changed = self._pages, []
        for row, pages in told:
            if pages is not known[row] and pages != known[row]:
                changed.append((row, pages))
            known[row] = pages
        return changed

    def _place(self, runs: Sequence[Run]) -> None:
        ids = [run.id for run in runs]
        if ids == self._ids:
            return
        count = len(ids)
        known = dict(zip(self._ids, self.places, strict=True))
        places = [known.get(request, count) for request in ids]
        taken = {row for row in places if row < count}
        free = iter([row for row in range(count) if row not in taken])
        self._ids = ids
        self.places = [row if row < count else next(free) for row in places]
        self.index = np.array(self.places, dtype=np.int64)
