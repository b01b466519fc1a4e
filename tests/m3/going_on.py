"""Decode steps launched behind one another, told as little as can be, against the same steps one after the other."""

from collections.abc import Callable, Sequence

import msgspec

from pdkv.m3.decode_graphs import DecodeGraphs
from pdkv.m3.run import PENDING, Onward, Run
from pdkv.m3.sampling import Sample

MakeRun = Callable[[int, tuple[int, ...], int], Run]
"""Of a sequence, by its number: these tokens from this position on, with the pages up to there."""


def check_going_on(ahead: DecodeGraphs, waiting: DecodeGraphs, run: MakeRun, starts: tuple[int, int, int]) -> None:
    """Both hold the state of three sequences before ``starts``; the last of them ends a block two tokens later.

    ``ahead`` launches every step before the last one is waited for: in another order and shape, over a block's end
    with not a word, with one that leaves and another that joins, and with one left, whose row is another then.
    """
    a, b, c = starts
    first = [run(0, (6,), a), run(1, (7,), b), run(2, (8,), c)]
    chosen = _samples(waiting, first)
    wanted = [chosen, _samples(waiting, [run(2, (_token(chosen, 2),), c + 1), run(0, (_token(chosen, 0),), a + 1)])]
    wanted.append(_samples(waiting, [run(2, (_token(wanted[1], 0),), c + 2), run(0, (_token(wanted[1], 1),), a + 2)]))
    wanted.append(_samples(waiting, [run(2, (_token(wanted[2], 0),), c + 3), run(1, (_token(chosen, 1),), b + 1)]))
    wanted.append(_samples(waiting, [run(2, (_token(wanted[3], 0),), c + 4)]))
    whole = run(2, (PENDING,), c + 4).pages
    second = msgspec.structs.replace(run(2, (PENDING,), c + 1), behind=2, pages=whole)
    steps: Sequence[list[Run] | Onward] = [
        first,
        [second, msgspec.structs.replace(run(0, (PENDING,), a + 1), behind=0)],
        Onward(),
        Onward(left=(1,), joined=(run(1, (_token(chosen, 1),), b + 1),)),
        Onward(left=(1,)),
    ]
    flight, found = ahead.launch(steps[0]), []
    for step in steps[1:]:
        behind = ahead.launch(step)
        found.append(flight.wait().samples())
        flight = behind
    found.append(flight.wait().samples())
    assert found == wanted


def _samples(graphs: DecodeGraphs, runs: list[Run]) -> list[Sample | None]:
    return graphs.launch(runs).wait().samples()


def _token(samples: Sequence[Sample | None], place: int) -> int:
    sample = samples[place]
    assert sample is not None
    return sample.token
