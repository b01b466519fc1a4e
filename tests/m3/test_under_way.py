"""Decodes that go on for long without a word between the scheduler and each of them: nothing of them is lost."""

import numpy as np

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
from pdkv.m3.sampling import GreedyChoices, SamplingParams
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

    def begin(self, number: int) -> None:
        id_ = RequestId(bytes([number]))
        self.scheduler.submit(
            DecodeRequest(id=id_, prompt=PROMPTS[number], max_tokens=MOST_TOKENS[number], sampling=SamplingParams())
        )
        self.tokens[id_] = []
        self.take(self.scheduler.resume(id_, 900 + number, -1.0))

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
        step, size = self.flights.pop(0)
        tokens = (self.num_chosen + np.arange(size)) % VOCAB
        self.num_chosen += size
        self.take(self.scheduler.complete(step, GreedyChoices(tokens, np.full(size, -0.5))))

    def take(self, events: list[EngineEvent]) -> None:
        for event in singly(events):
            if isinstance(event, TokenGenerated):
                self.tokens[event.id].append(event.token)
            elif isinstance(event, RequestFinished):
                self.ended.add(event.id)


def test_pages_are_kept_under_the_names_of_what_was_told_however_long_ago() -> None:
    device = Device()
    device.begin(0)
    device.begin(1)
    for number in range(600):
        if number == 7:
            device.begin(2)
        if device.scheduler.can_run:
            device.turn()
    assert len(device.ended) == 3
    assert device.num_silent > 380, "most steps say nothing of anybody"
    for number, (prompt, most) in enumerate(zip(PROMPTS, MOST_TOKENS, strict=True)):
        tokens = device.tokens[RequestId(bytes([number]))]
        assert len(tokens) == most
        computed = [*prompt, *tokens][:-1]
        names = BlockNames(SEED, BLOCK).first(len(computed) // BLOCK, computed)
        assert len(device.pool.find(names)) == len(names), number
    assert device.pool.num_free == NUM_PAGES
