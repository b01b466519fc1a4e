"""Decode steps launched behind one another, told as little as can be, against the same steps one after the other."""

from collections.abc import Callable, Sequence

import msgspec

from pdkv.m3.decode_graphs import DecodeGraphs
from pdkv.m3.run import Onward, Run
from pdkv.m3.sampling import Sample

MakeRun = Callable[[int, tuple[int, ...], int], Run]
"""Of a sequence, by its number: these tokens from this position on, with the pages up to there."""


_STEPS = ((0, 1, 2),) * 3 + ((2, 0),) * 3 + ((2, 1),) * 3 + ((1,),) * 3
"""Sequences of each step, in order."""


def check_going_on(ahead: DecodeGraphs, waiting: DecodeGraphs, run: MakeRun, starts: tuple[int, int, int]) -> None:
    """Both hold the state of three sequences before ``starts``; the last of them ends a block two tokens later.

    ``ahead`` launches steps before the last one is waited for, where they take their tokens from it: with not a word,
    over a block's end and beside an empty row; after one in another order and shape; with one that leaves and another
    that joins; and with one left, whose row is another then.
    """
    tokens = {number: [6 + number] for number in range(3)}
    wanted = []
    for members in _STEPS:
        runs = [run(number, (tokens[number][-1],), starts[number] + len(tokens[number]) - 1) for number in members]
        wanted.append(_samples(waiting, runs))
        for number, sample in zip(members, wanted[-1], strict=True):
            assert sample is not None
            tokens[number].append(sample.token)

    def whole(number: int, count: int) -> Run:
        """The run of its ``count``-th token, with all pages that it will come to."""
        pages = run(number, (0,), starts[number] + len(tokens[number])).pages
        told = run(number, (tokens[number][count],), starts[number] + count)
        return msgspec.structs.replace(told, pages=pages)

    steps: Sequence[list[Run] | Onward] = [
        [whole(0, 0), whole(1, 0), whole(2, 0)],
        *(Onward(), Onward()),
        [whole(2, 3), whole(0, 3)],
        *(Onward(), Onward()),
        Onward(left=(1,), joined=(whole(1, 3),)),
        *(Onward(), Onward()),
        Onward(left=(0,)),
        *(Onward(), Onward()),
    ]
    flight, found = ahead.launch(steps[0]), []
    for step in steps[1:]:
        if isinstance(step, Onward):
            behind = ahead.launch(step)
            found.append(flight.wait().samples())
            flight = behind
        else:  # tells tokens, which somebody has read
            found.append(flight.wait().samples())
            flight = ahead.launch(step)
    found.append(flight.wait().samples())
    assert found == wanted


def _samples(graphs: DecodeGraphs, runs: list[Run]) -> list[Sample | None]:
    return graphs.launch(runs).wait().samples()
