"""Any history with a step under way between any two things that happen: what it stores, it may store at its end."""

from dataclasses import dataclass

import msgspec
import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import rule

from pdkv.m3.requests import RequestId
from pdkv.m3.run import Onward, Run, Step, seated, seating
from pdkv.m3.sampling import NO_TOKEN, Choices, Sample
from tests.m3.test_scheduler_histories import BATCH, BLOCK, CHUNK, SchedulerHistories, next_token


@dataclass(frozen=True)
class Flight:
    """A step that the device has been given: with the tokens that it finds there, and what it chooses."""

    asked: Step
    runs: list[Run]
    tokens: dict[RequestId, tuple[int, ...]]
    samples: list[Sample | None]
    places: dict[RequestId, int]
    """Whose tokens the step before chooses, in which place; those of other runs are known."""


class OverlappedHistories(SchedulerHistories):
    drafts = 0

    def __init__(self) -> None:
        super().__init__()
        self.flying: Flight | None = None

    @property
    def is_flying(self) -> bool:
        return self.flying is not None

    @rule(damaged=st.sampled_from([None] * 9 + [0, 1]))
    def step(self, damaged: int | None) -> None:
        admitted = self.scheduler.admit()
        self.take(admitted)
        if admitted:
            return
        flight = self.flying or self.launch(None, damaged)
        self.flying = self.launch(flight, damaged) if flight.runs else None
        if self.flying is not None and not self.flying.runs:
            self.flying = None
        for run in flight.runs:
            self.store(run, flight.tokens[run.id])
        self.take(self.scheduler.complete(flight.asked, told(flight.samples)))

    def launch(self, before: Flight | None, damaged: int | None) -> Flight:
        step = self.scheduler.schedule()
        runs, places = self.onward(before, step) if isinstance(step, Onward) else (step, {})
        flight = Flight(step, runs, {}, [], places)
        self.check_flight(flight)
        for number, run in enumerate(runs):
            known = [*self.requests[run.id].prompt, *self.generated[run.id]]
            tokens, start = run.tokens, self.computed[run.id]
            if run.id in places:
                assert before is not None
                assert before.runs[places[run.id]].id == run.id
                chosen = before.samples[places[run.id]]
                tokens, start = (chosen.token if chosen is not None else 0,), start + 1
            assert run.start == start
            flight.tokens[run.id] = tokens
            self.store(run, tokens)
            seen = [token for page in run.pages for token in self.memory[page]][: run.end]
            assert seen[: min(run.start, len(known))] == known[: run.start], "state that is not this request's"
            if run.sampling is not None:
                flight.samples.append(None if number == damaged else Sample(next_token(seen), 0.0))
        return flight

    def onward(self, before: Flight | None, step: Onward) -> tuple[list[Run], dict[RequestId, int]]:
        """What it stands for, and the places of those that stay."""
        assert before is not None
        assert all(len(run.tokens) == 1 for run in before.runs)
        further = [msgspec.structs.replace(run, start=run.start + 1) for run in before.runs]
        runs = seated(further, seating(len(further), step.left, len(step.joined)), step.joined)
        stay = [run.id for place, run in enumerate(before.runs) if place not in step.left]
        assert sorted(run.id for run in runs) == sorted([*stay, *(run.id for run in step.joined)])
        return runs, {run.id: place for place, run in enumerate(before.runs) if run.id in stay}

    def store(self, run: Run, tokens: tuple[int, ...]) -> None:
        """By page number, whoever has the pages now."""
        for position, token in enumerate(tokens, start=run.start):
            self.memory[run.pages[position // BLOCK]][position % BLOCK] = token

    def check_flight(self, flight: Flight) -> None:
        runs = flight.runs
        self.check_budgets([run for run in runs if run.id not in flight.places])
        assert len({run.id for run in runs}) == len(runs)
        assert sum(bool(self.generated[run.id]) for run in runs) <= BATCH
        assert sum(len(run.tokens) for run in runs if not self.generated[run.id]) <= CHUNK
        for run in runs:
            if run.id in flight.places:
                assert len(self.generated[run.id]) + 2 <= self.requests[run.id].max_tokens, "its end was known"


def told(samples: list[Sample | None]) -> Choices:
    """As a device does it."""
    tokens = [NO_TOKEN if sample is None else sample.token for sample in samples]
    return Choices(np.array(tokens, dtype=np.int64), np.zeros(len(samples)))


OverlappedHistories.TestCase.settings = settings(max_examples=120, stateful_step_count=40)
TestOverlappedHistories = OverlappedHistories.TestCase
