"""Decodes that go on for long without a word between the scheduler and each of them: nothing of them is lost."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pdkv.m3.prefix_cache import BlockNames
from pdkv.m3.requests import (
    DecodeRequest,
    EngineEvent,
    EngineSettings,
    RequestFinished,
    RequestId,
    TokenGenerated,
    singly,
)
from pdkv.m3.run import Onward, Step, TokenBounds
from pdkv.m3.sampling import Choices, SamplingParams
from pdkv.m3.scheduler import Scheduler
from pdkv.memory.pages import PagePool

BLOCK, VOCAB, NUM_PAGES = 4, 1000, 400
SEED = b"of this test"
PROMPTS = ((1, 2, 3), (4,) * 6, (5, 6, 7, 8))
MOST_TOKENS = 290, 400, 300


class Device:
    """Chooses another token in every place of every step; two steps are under way at a time."""

    def __init__(self) -> None:
        self.pool = PagePool(NUM_PAGES)
        settings = EngineSettings(max_model_len=500, max_batch=4, prefix_seed=SEED)
        bounds = TokenBounds(block_size=BLOCK, vocab_size=VOCAB, eos_tokens=frozenset())
        self.scheduler = Scheduler(self.pool, settings, bounds)
        self.flights: list[tuple[Step, int]] = []
        self.num_chosen = 0
        self.num_silent = 0
        self.tokens: dict[RequestId, list[int]] = {}
        self.ended: set[RequestId] = set()

    def begin(self, number: int, prompt: tuple[int, ...], max_tokens: int) -> None:
        id_ = RequestId(bytes([number]))
        request = DecodeRequest(id=id_, prompt=prompt, max_tokens=max_tokens, sampling=SamplingParams())
        assert self.scheduler.submit(request), "there is room for all"
        self.tokens[id_] = []
        self.take(self.scheduler.resume(id_, 900 + number, -1.0))

    def check_kept(self, number: int, prompt: tuple[int, ...]) -> None:
        """All blocks that were filled are kept under the names of what was told."""
        computed = [*prompt, *self.tokens[RequestId(bytes([number]))]][:-1]
        names = BlockNames(SEED, BLOCK).first(len(computed) // BLOCK, computed)
        assert len(self.pool.find(names)) == len(names), number

    def launch(self) -> None:
        step = self.scheduler.schedule()
        if isinstance(step, Onward):
            self.num_silent += step == Onward()
            self.flights.append((step, self.flights[-1][1] - len(step.left) + len(step.joined)))
        elif step:
            self.flights.append((step, len(step)))

    def turn(self) -> None:
        if not self.flights:
            self.launch()
        self.launch()
        if not self.flights:
            return
        step, size = self.flights.pop(0)
        tokens = (self.num_chosen + np.arange(size)) % VOCAB
        self.num_chosen += size
        self.take(self.scheduler.complete(step, Choices(tokens, np.full(size, -0.5))))

    def take(self, events: list[EngineEvent]) -> None:
        for event in singly(events):
            if isinstance(event, TokenGenerated):
                self.tokens[event.id].append(event.token)
            elif isinstance(event, RequestFinished):
                self.ended.add(event.id)


def test_pages_are_kept_under_the_names_of_what_was_told_however_long_ago() -> None:
    device = Device()
    for number in range(600):
        for which in {0: (0, 1), 7: (2,)}.get(number, ()):
            device.begin(which, PROMPTS[which], MOST_TOKENS[which])
        if device.scheduler.can_run:
            device.turn()
    assert len(device.ended) == 3
    assert device.num_silent > 380, "most steps say nothing of anybody"
    for which, (prompt, most) in enumerate(zip(PROMPTS, MOST_TOKENS, strict=True)):
        assert len(device.tokens[RequestId(bytes([which]))]) == most
        device.check_kept(which, prompt)
    assert device.pool.num_free == NUM_PAGES


jobs = st.lists(
    st.tuples(st.integers(1, 9), st.integers(1, 60), st.integers(0, 9), st.booleans()), min_size=1, max_size=9
)
"""Tokens of the prompt, tokens to generate, turns before it comes, whether the one before is given up then."""


@given(jobs=jobs)
def test_whoever_gets_anothers_place_keeps_its_own_tokens(jobs: list[tuple[int, int, int, bool]]) -> None:
    """More than there are places for, so some wait for one; who is last takes that of one that has left."""
    device = Device()
    prompts = [tuple(range(20 * number, 20 * number + length)) for number, (length, *_) in enumerate(jobs)]
    given_up = set()
    for number, (_, most, turns, gives_up) in enumerate(jobs):
        for _ in range(turns):
            device.turn()
        if gives_up and number and RequestId(bytes([number - 1])) not in device.ended:
            device.scheduler.release(RequestId(bytes([number - 1])))
            given_up.add(number - 1)
        device.begin(number, prompts[number], most)
    while device.flights or device.scheduler.can_run:
        device.turn()
    assert device.ended == {RequestId(bytes([number])) for number in range(len(jobs)) if number not in given_up}
    for number, (prompt, (_, most, *_)) in enumerate(zip(prompts, jobs, strict=True)):
        assert number in given_up or len(device.tokens[RequestId(bytes([number]))]) == most
        device.check_kept(number, prompt)
    assert device.pool.num_free == NUM_PAGES
