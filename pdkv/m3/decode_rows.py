"""Which row of a decode step's buffers each sequence has: the same from step to step, so little is written anew."""

from collections.abc import Sequence

import numpy as np

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run

END, START, BEHIND, TOKENS = 0, 1, 2, 3
"""Columns of a sequence's row of numbers: where its tokens end, from which position on they are stored, the row of the
step before whose choice is its last token (-1: it is among its tokens), and its tokens."""

Numbers = np.ndarray[tuple[int, int], np.dtype[np.int32]]


class DecodeRows:
    """Rows of sequences in steps that follow one another, and the page tables in them. Owned by the engine thread.

    Rows of a step are its first, without a gap. Whoever stays keeps its row, unless it is beyond the step's last.
    """

    def __init__(self, most: int) -> None:
        """``most``: sequences of a step."""
        self._ids: list[RequestId] = []
        self._places: list[int] = []
        self._index: np.ndarray[tuple[int], np.dtype[np.int64]] = np.zeros(0, dtype=np.int64)
        self._pages: list[tuple[int, ...]] = [() for _ in range(most)]

    def enter(self, runs: Sequence[Run], numbers: Numbers, query_len: int) -> list[int]:
        """Write what the step is told of ``runs`` but their pages; returns each one's row.

        A run of fewer tokens than ``query_len`` has them last: rows before them repeat what is stored already.
        """
        before = self._places
        self._place(runs)
        index = self._index
        starts = np.array([run.start for run in runs], dtype=np.int32)
        begin = TOKENS + query_len
        if query_len == 1:
            lengths: np.ndarray[tuple[int], np.dtype[np.int32]] | int = 1
            numbers[index, TOKENS] = [run.tokens[0] for run in runs]
        else:
            lengths = np.array([len(run.tokens) for run in runs], dtype=np.int32)
            for row, run in zip(self._places, runs, strict=True):
                numbers[row, begin - len(run.tokens) : begin] = run.tokens
        numbers[index, START] = starts
        numbers[index, END] = starts + lengths
        numbers[index, BEHIND] = [-1 if run.behind is None else before[run.behind] for run in runs]
        return self._places

    def new_pages(self, runs: Sequence[Run]) -> list[tuple[int, tuple[int, ...]]]:
        """Rows whose page table is another than it was, and what it is now. Asked once a step, after ``enter``."""
        known, changed = self._pages, []
        for row, run in zip(self._places, runs, strict=True):
            pages = run.pages
            if pages is not known[row] and pages != known[row]:
                changed.append((row, pages))
            known[row] = pages
        return changed

    def _place(self, runs: Sequence[Run]) -> None:
        ids = [run.id for run in runs]
        if ids == self._ids:
            return
        count = len(ids)
        known = dict(zip(self._ids, self._places, strict=True))
        places = [known.get(request, count) for request in ids]
        taken = {row for row in places if row < count}
        free = iter([row for row in range(count) if row not in taken])
        self._ids = ids
        self._places = [row if row < count else next(free) for row in places]
        self._index = np.array(self._places, dtype=np.int64)
