"""Rows of decode steps, whoever comes and goes: what the device reads there is what each sequence's step is."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.m3.decode_rows import BEHIND, END, GROWS, START, TOKENS, DecodeRows, Numbers, TableChanges
from pdkv.m3.requests import RequestId
from pdkv.m3.run import PENDING, Onward, Run
from pdkv.m3.sampling import SamplingParams

MOST = 6
JUNK = -7


class Device:
    """The tables and numbers as copies make them and as steps take them further, and the rows of the step before."""

    def __init__(self) -> None:
        self.rows = DecodeRows(MOST)
        self.tables: list[tuple[int, ...]] = [()] * MOST
        self.numbers = np.zeros((MOST, TOKENS + 1), dtype=np.int32)
        self.before: dict[int, int] = {}
        """Rows of the latest step, by sequence."""

    def enter(self, runs: list[Run]) -> None:
        told = np.full_like(self.numbers, JUNK)
        self.change(self.rows.enter(runs, told, 1), told)

    def go_on(self, step: Onward) -> None:
        # The host writes the two sides by turns: of nothing that is left from the step before may anything be needed.
        told = np.full_like(self.numbers, JUNK)
        changes = self.rows.go_on(step, told)
        if changes is not None:
            self.change(changes, told)
        else:
            assert (told == JUNK).all()

    def change(self, changes: TableChanges, told: Numbers) -> None:
        count = len(self.rows.index)
        self.numbers[:count] = told[:count]
        assert not {to for to, _ in changes.moved} & {source for _, source in changes.moved}
        for to, source in changes.moved:
            self.tables[to] = self.tables[source]
        for row, pages in changes.written:
            self.tables[row] = pages

    def check(self, now: dict[int, int], joined: set[int]) -> None:
        """``now``: where each sequence's only token stands, by sequence, in the order of the step."""
        rows = self.rows.index.tolist()
        assert sorted(rows) == list(range(len(now)))
        for row, (number, start) in zip(rows, now.items(), strict=True):
            assert self.tables[row] == pages_of(number)
            behind = -1 if number in joined else self.before[number]
            assert self.numbers[row, [END, START, BEHIND]].tolist() == [start + 1, start, behind]
            assert number not in joined or self.numbers[row, TOKENS] == 100 + number
        self.before = dict(zip(now, rows, strict=True))
        self.numbers[:, [END, START]] += self.numbers[:, [GROWS]]  # as the device does
        self.numbers[:, BEHIND] = range(MOST)


def pages_of(number: int) -> tuple[int, ...]:
    return tuple(range(10 * number, 10 * number + 1 + number % 4))


def run(number: int, start: int, behind: int | None = None) -> Run:
    tokens = (100 + number,) if behind is None else (PENDING,)
    id_ = RequestId(b"%d" % number)
    return Run(id=id_, tokens=tokens, start=start, pages=pages_of(number), sampling=SamplingParams(), behind=behind)


steps = st.lists(st.tuples(st.sets(st.integers(0, MOST - 1)), st.integers(0, MOST), st.booleans()), max_size=12)
"""Places that leave where there are such, how many join where there is room, whether the step says all of itself."""


@given(first=st.integers(1, MOST), steps=steps)
@settings(deadline=None)
def test_whoever_stays_is_found_and_whoever_joins_has_all_it_needs(
    first: int, steps: list[tuple[set[int], int, bool]]
) -> None:
    device = Device()
    now = {number: 5 * number for number in range(first)}
    num_known = first
    device.enter([run(number, start) for number, start in now.items()])
    device.check(now, set(now))
    for leaving, joining, says_all in steps:
        left = sorted(place for place in leaving if place < len(now))
        places = {number: place for place, number in enumerate(now)}
        now = {number: start + 1 for number, start in now.items() if places[number] not in left}
        new = range(num_known, num_known + min(joining, MOST - len(now)))
        num_known += len(new)
        joined = tuple(run(number, 7 * number) for number in new)
        if not now and not new:
            return
        if says_all:
            device.enter([*(run(number, start, places[number]) for number, start in now.items()), *joined])
        else:
            device.go_on(Onward(tuple(left), joined))
        now |= {number: 7 * number for number in new}
        device.check(now, set(new))


def test_whoever_stays_keeps_its_row_and_its_table() -> None:
    rows, numbers = DecodeRows(MOST), np.zeros((MOST, TOKENS + 1), dtype=np.int32)
    rows.enter([run(number, 3) for number in range(4)], numbers, 1)
    assert rows.go_on(Onward(), numbers) is None
    changes = rows.go_on(Onward(left=(1,), joined=(run(4, 9),)), numbers)
    assert rows.index.tolist() == [0, 2, 3, 1]
    assert changes == TableChanges([], [(1, pages_of(4))])
    changes = rows.go_on(Onward(left=(0,)), numbers)
    assert rows.index.tolist() == [2, 0, 1], "the one beyond the last takes the room of the one that left"
    assert changes == TableChanges([(0, 3)], [])
