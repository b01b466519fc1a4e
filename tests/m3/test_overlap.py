"""Steps launched before the last one's tokens are known: the answers of one step after the other, pages in peace."""

from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.logprobs import TopLogprobs
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import (
    DecodeRequest,
    EngineEvent,
    EngineSettings,
    FinishReason,
    PagesReserved,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
    singly,
)
from pdkv.m3.run import Onward, Step
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepInFlight, StepOutput, StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from pdkv.verify.state_loss import PrefilledPrompt, prefill
from tests.soak import write_tiny_checkpoint

GREEDY, HOT = SamplingParams(), SamplingParams(temperature=2.0, seed=3)
WAYS = (GREEDY, HOT, SamplingParams(temperature=1.5, seed=-9, top_p=0.8), GREEDY, SamplingParams(1.0, 4, 0.5))
"""How each prompt is answered."""
EVERY_NINTH = tuple(range(4, 320, 9))
NUM_PAGES, BATCH = 7, 3
LENGTHS = (3, 90, 120, 127, 200)
MOST_TOKENS = 24


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> M3Model:
    """Which says an end token every now and then."""
    directory: Path = tmp_path_factory.mktemp("checkpoint")
    write_tiny_checkpoint(directory)
    model = load_model(directory)
    model.config = msgspec.structs.replace(model.config, eos_token_ids=EVERY_NINTH)
    return model


@pytest.fixture(scope="module")
def sources(model: M3Model) -> list[PrefilledPrompt]:
    """Prompts whose state is there already, as if from another worker."""
    return [prefill(model, [(which * 41 + i * i) % 317 + 3 for i in range(n)]) for which, n in enumerate(LENGTHS)]


class LateStep:
    """A step of a device that does nothing before somebody waits for it: as late as any could be."""

    def __init__(self, runner: StepRunner, step: Step, queue: list["LateStep"]) -> None:
        self._runner, self._step, self._queue = runner, step, queue
        self._flight: StepInFlight | None = None
        queue.append(self)

    def compute(self) -> None:
        self._flight = self._runner.launch(self._step)

    def wait(self) -> StepOutput:
        assert self._queue.pop(0) is self, "steps are waited for in the order in which they were launched"
        self.compute()
        assert self._flight is not None
        return self._flight.wait()


class LateRunner:
    """Counts how many steps were launched behind another one."""

    overlaps = True

    def __init__(self, runner: StepRunner) -> None:
        self._runner = runner
        self.config = runner.config
        self.queue: list[LateStep] = []
        self.launched: list[Step] = []

    def launch(self, step: Step) -> LateStep:
        assert len(self.queue) < 2
        self.launched.append(step)
        return LateStep(self._runner, step, self.queue)


class Worker:
    """A decode worker whose transfers are copies: a page is written as soon as it is reserved."""

    def __init__(self, model: M3Model, *, overlap: bool, late: bool = False, cached: bool = False) -> None:
        self.arena = Arena.allocate(RowLayout.of(kv_layout(model.config)), NUM_PAGES)
        self.arena.rows().fill_(0xFF)  # NaN: what is read before it is written shows
        limits = EngineSettings(
            max_model_len=300, max_batch=BATCH, overlap=overlap, prefix_seed=b"seed" if cached else None
        )
        shapes = DecodeShapes.of(limits, 128, NUM_PAGES)
        runner = StepRunner(model, self.arena, shapes, always_shaped=True)
        self.runner = LateRunner(runner) if late else runner
        self.pool = PagePool(NUM_PAGES)
        self.engine = Engine(self.runner, self.pool, limits)
        self.sources: dict[RequestId, PrefilledPrompt] = {}
        self.tokens: dict[RequestId, list[int]] = {}
        self.tops: dict[RequestId, list[TopLogprobs]] = {}
        self.reasons: dict[RequestId, FinishReason] = {}
        self.pages: dict[RequestId, tuple[int, ...]] = {}

    def submit(self, request: DecodeRequest, source: PrefilledPrompt) -> None:
        self.sources[request.id], self.tokens[request.id] = source, []
        self.take(self.engine.submit(request))

    def take(self, events: list[EngineEvent]) -> None:
        for event in singly(events):
            assert event.id not in self.reasons, f"{event} after the end"
            match event:
                case PagesReserved(id=id_, pages=pages, cached_tokens=cached):
                    self.pages[id_] = pages
                    self.receive(self.sources[id_], pages, cached)
                    source = self.sources[id_]
                    self.take(self.engine.resume(id_, source.token, source.logprob))
                case TokenGenerated(id=id_, token=token, top=top):
                    self.tokens[id_].append(token)
                    self.tops.setdefault(id_, []).append(top)
                case RequestFinished(id=id_, reason=reason):
                    self.reasons[id_] = reason
                case _:
                    raise AssertionError(event)

    def receive(self, source: PrefilledPrompt, pages: tuple[int, ...], cached: int) -> None:
        """What the prefix cache lacks; the rest of the pages becomes NaN again."""
        first = cached // 128
        self.arena.rows()[list(pages[first:])] = 0xFF
        for spec in self.arena.layout.kv.specs:
            target, its = self.arena.view(spec.name, spec.layer), source.arena.view(spec.name, spec.layer)
            for page, its_page in zip(pages[first:], source.pages[first:], strict=False):
                target[page] = its[its_page]

    def run(self) -> None:
        while self.engine.has_work:
            self.take(self.engine.step())


def rid(number: int) -> RequestId:
    return RequestId(b"%d" % number)


def request(number: int, source: PrefilledPrompt, max_tokens: int, *, ignore_eos: bool = False) -> DecodeRequest:
    sampling = WAYS[LENGTHS.index(len(source.tokens))]
    return DecodeRequest(
        id=rid(number), prompt=source.tokens, max_tokens=max_tokens, sampling=sampling, ignore_eos=ignore_eos
    )


@pytest.fixture(scope="module")
def answers(model: M3Model, sources: list[PrefilledPrompt]) -> list[list[int]]:
    """What each prompt is answered alone, one step after the other, blind to end tokens."""
    found = []
    for source in sources:
        worker = Worker(model, overlap=False)
        worker.submit(request(0, source, MOST_TOKENS, ignore_eos=True), source)
        worker.run()
        found.append(worker.tokens[rid(0)])
    return found


def expected(answer: list[int], asked: DecodeRequest) -> tuple[list[int], FinishReason]:
    for count, token in enumerate(answer[: asked.max_tokens], start=1):
        if token in EVERY_NINTH and not asked.ignore_eos:
            return answer[:count], FinishReason.STOP
    return answer[: asked.max_tokens], FinishReason.LENGTH


jobs = st.lists(
    st.tuples(
        st.integers(0, len(LENGTHS) - 1),
        st.integers(1, MOST_TOKENS),
        st.booleans(),
        st.sampled_from([None, None, None, 1, 2, 5]),
        st.integers(0, 6),
    ),
    min_size=1,
    max_size=8,
)
"""Prompt, max_tokens, ignore_eos, tokens after which it is given up, steps before the next one comes."""


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@given(jobs=jobs, cached=st.booleans())
@settings(max_examples=20)
def test_overlapped_steps_answer_as_steps_that_wait(
    model: M3Model,
    sources: list[PrefilledPrompt],
    answers: list[list[int]],
    late: bool,
    jobs: list[tuple[int, int, bool, int | None, int]],
    cached: bool,
) -> None:
    """Requests come, end by length, by an end token or because they are given up, and their pages go to the next. What
    is drawn for one hangs on nobody's company."""
    worker = Worker(model, overlap=True, late=late, cached=cached)
    given_up: dict[RequestId, int] = {}
    asked = []
    for number, (which, max_tokens, ignore_eos, at, steps) in enumerate(jobs):
        asked.append((request(number, sources[which], max_tokens, ignore_eos=ignore_eos), answers[which]))
        worker.submit(asked[-1][0], sources[which])
        if at is not None:
            given_up[rid(number)] = at
        for _ in range(steps):
            _step(worker, given_up)
    while worker.engine.has_work:
        _step(worker, given_up)
    for one, answer in asked:
        tokens, reason = expected(answer, one)
        told = worker.tokens[one.id]
        if one.id in worker.reasons:
            assert (told, worker.reasons[one.id]) == (tokens, reason)
        else:
            assert told == tokens[: len(told)]
            assert one.id in given_up
    assert worker.pool.num_free == NUM_PAGES
    worker.engine.empty_cache()
    assert worker.pool.statistics().largest_run == NUM_PAGES


def _step(worker: Worker, given_up: dict[RequestId, int]) -> None:
    worker.take(worker.engine.step())
    for id_, at in given_up.items():
        if len(worker.tokens[id_]) >= at:
            worker.engine.release(id_)


def test_a_step_is_launched_before_the_last_one_is_waited_for(model: M3Model, sources: list[PrefilledPrompt]) -> None:
    worker = Worker(model, overlap=True, late=True)
    assert isinstance(worker.runner, LateRunner)
    launched = worker.runner.launched
    worker.submit(request(1, sources[3], 6, ignore_eos=True), sources[3])
    worker.submit(request(2, sources[1], 4, ignore_eos=True), sources[1])
    worker.take(worker.engine.step())
    assert [run.pages for run in launched[0]] == [worker.pages[rid(n)] for n in (1, 2)], "those they will come to too"
    assert launched[1] == Onward(), "the same two again, one of them at position 128"
    assert [len(worker.tokens[rid(n)]) for n in (1, 2)] == [2, 2]
    worker.take(worker.engine.step())
    assert launched[2] == Onward()
    worker.take(worker.engine.step())
    assert launched[3] == Onward(left=(1,)), "the other one ends"
    assert worker.reasons == {rid(2): FinishReason.LENGTH}
    worker.submit(request(3, sources[2], 2, ignore_eos=True), sources[2])
    worker.take(worker.engine.step())
    (joined,) = launched[4].joined
    assert (joined.id, joined.start, launched[4].left) == (rid(3), 120, ())
    worker.run()
    assert len(launched) == 5
    assert not worker.engine.has_work


def test_an_end_token_costs_one_step_whose_choice_is_dropped(
    model: M3Model, sources: list[PrefilledPrompt], answers: list[list[int]]
) -> None:
    which = next(n for n, answer in enumerate(answers) if any(t in EVERY_NINTH for t in answer[1:-2]))
    worker = Worker(model, overlap=True, late=True, cached=True)
    assert isinstance(worker.runner, LateRunner)
    worker.submit(request(1, sources[which], MOST_TOKENS), sources[which])
    free = worker.pool.num_free
    while rid(1) not in worker.reasons:
        worker.take(worker.engine.step())
    assert worker.pool.num_free == free, "the step behind still writes to its pages"
    assert worker.engine.has_work
    worker.run()
    assert worker.pool.num_free == NUM_PAGES
    assert worker.tokens[rid(1)] == expected(answers[which], request(1, sources[which], MOST_TOKENS))[0]
    assert len(worker.runner.launched) == len(worker.tokens[rid(1)])  # the first token is no step's, the last has one


def test_an_id_may_be_used_again_while_its_last_step_is_in_flight(
    model: M3Model, sources: list[PrefilledPrompt], answers: list[list[int]]
) -> None:
    worker = Worker(model, overlap=True, late=True)
    worker.submit(request(1, sources[1], 9, ignore_eos=True), sources[1])
    worker.take(worker.engine.step())
    worker.engine.release(rid(1))
    worker.submit(request(1, sources[2], 9, ignore_eos=True), sources[2])
    worker.run()
    assert worker.tokens[rid(1)] == answers[2][:9]
    assert worker.pool.num_free == NUM_PAGES


def test_likeliest_tokens_come_with_steps_as_one_by_one(model: M3Model, sources: list[PrefilledPrompt]) -> None:
    """Of who asks for them, whoever comes and goes beside it."""
    told = []
    for overlap in (True, False):
        worker = Worker(model, overlap=overlap)
        if not overlap:  # no shapes: choices are made beside the step
            plain = StepRunner(model, worker.arena)
            worker.engine = Engine(plain, worker.pool, EngineSettings(max_model_len=300, max_batch=BATCH))
        worker.submit(request(0, sources[0], 4, ignore_eos=True), sources[0])
        for number, num_top in ((1, 3), (2, 1)):
            asked = msgspec.structs.replace(request(number, sources[number], 6, ignore_eos=True), num_top=num_top)
            worker.submit(asked, sources[number])
        worker.run()
        told.append(worker)
    for number, num_top in ((0, 0), (1, 3), (2, 1)):
        found, wanted = (worker.tops[rid(number)][1:] for worker in told)  # the first token comes with its state
        assert told[0].tokens[rid(number)] == told[1].tokens[rid(number)]
        assert [top.token_ids for top in found] == [top.token_ids for top in wanted]
        assert {len(top.logprobs) for top in found} == {num_top}
        for mine, its in zip(found, wanted, strict=True):
            assert mine.logprobs == pytest.approx(its.logprobs, abs=1e-4)


def test_proposals_wait_for_the_host(model: M3Model, sources: list[PrefilledPrompt]) -> None:
    """They hang on tokens: no step is launched behind theirs."""
    worker = Worker(model, overlap=True, late=True)
    limits = EngineSettings(max_model_len=300, max_batch=BATCH, speculative_tokens=2)
    assert isinstance(worker.runner, LateRunner)
    shaped = StepRunner(model, worker.arena, DecodeShapes.of(limits, 128, NUM_PAGES), always_shaped=True)
    worker.runner = LateRunner(shaped)
    worker.engine = Engine(worker.runner, worker.pool, limits)
    worker.submit(request(1, sources[0], 6, ignore_eos=True), sources[0])
    worker.run()
    assert not any(isinstance(step, Onward) for step in worker.runner.launched)
    assert len(worker.tokens[rid(1)]) == 6


def test_damage_that_is_found_late_ends_only_the_request_that_has_it(
    model: M3Model, sources: list[PrefilledPrompt], answers: list[list[int]]
) -> None:
    worker = Worker(model, overlap=True, late=True)
    worker.submit(request(1, sources[1], 9, ignore_eos=True), sources[1])
    damaged = request(2, sources[3], 9, ignore_eos=True)
    (reserved,) = worker.engine.submit(damaged)
    assert isinstance(reserved, PagesReserved)
    worker.tokens[rid(2)] = []
    worker.engine.resume(rid(2), 64, 0.0)  # nobody filled its pages
    (refused,) = (event for event in singly(worker.engine.step()) if isinstance(event, RequestRefused))
    assert refused.id == rid(2)
    worker.run()
    assert worker.tokens[rid(1)][-7:] == answers[1][2:9]
    assert worker.pool.num_free == NUM_PAGES
