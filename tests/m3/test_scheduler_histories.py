"""Any history of requests over a pool that is too small: what is read is right, nothing shared is written, all ends.

The model is a function of the tokens before; a page holds the tokens that were stored in it, whoever stored them.
"""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdkv.m3.requests import (
    CompleteRequest,
    DecodeRequest,
    EngineEvent,
    EngineRequest,
    EngineSettings,
    FinishReason,
    PagesReserved,
    PrefillFinished,
    PrefillProgress,
    PrefillRequest,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
    singly,
)
from pdkv.m3.run import Run, TokenBounds
from pdkv.m3.sampling import Sample, SamplingParams
from pdkv.m3.scheduler import Scheduler
from pdkv.memory.pages import PagePool

BLOCK, EOS, JUNK = 4, 9, 49
NUM_PAGES, CHUNK, BATCH, DRAFTS = 14, 6, 2, 3
GREEDY = SamplingParams()


def next_token(tokens: list[int]) -> int:
    """What the model says after these: mostly the same round again, so that proposals are right and wrong."""
    place = len(tokens) % 11
    return EOS if sum(tokens) % 37 == 0 else 20 + (tokens[-1] * 3 + (place == 0)) % 7


def answer(prompt: tuple[int, ...], max_tokens: int, *, ignore_eos: bool) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_tokens:
        tokens.append(next_token(tokens))
        if tokens[-1] == EOS and not ignore_eos:
            break
    return tokens[len(prompt) :]


prompts = st.builds(
    lambda family, common, tail: tuple([20 + (i * family) % 7 for i in range(common)] + tail),
    family=st.sampled_from([1, 3]),
    common=st.integers(0, 34),
    tail=st.lists(st.integers(10, 12), min_size=1, max_size=8),
)


class SchedulerHistories(RuleBasedStateMachine):
    drafts = DRAFTS

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(NUM_PAGES + 2, reserved=(0, NUM_PAGES + 1))
        bounds = TokenBounds(block_size=BLOCK, vocab_size=50, eos_tokens=frozenset({EOS}))
        limits = EngineSettings(
            max_model_len=100,
            prefill_chunk=CHUNK,
            max_batch=BATCH,
            prefix_seed=b"seed",
            speculative_tokens=self.drafts,
        )
        self.scheduler = Scheduler(self.pool, limits, bounds)
        self.memory = {page: [JUNK] * BLOCK for page in range(NUM_PAGES + 2)}
        self.requests: dict[RequestId, EngineRequest] = {}
        self.queue: list[RequestId] = []
        self.reserved: dict[RequestId, PagesReserved] = {}
        self.computed: dict[RequestId, int] = {}
        self.generated: dict[RequestId, list[int]] = {}
        self.ended: set[RequestId] = set()

    # ---- what may happen

    def submit(self, request: EngineRequest) -> None:
        self.requests[request.id] = request
        self.queue.append(request.id)
        self.generated[request.id] = []
        self.take(self.scheduler.submit(request))

    def next_id(self) -> RequestId:
        return RequestId(len(self.requests).to_bytes(16, "big"))

    @rule(prompt=prompts, scored=st.sampled_from([None, None, None, 0]))
    def submit_prefill(self, prompt: tuple[int, ...], scored: int | None) -> None:
        self.submit(PrefillRequest(id=self.next_id(), prompt=prompt, sampling=GREEDY, prompt_top=scored))

    @rule(prompt=prompts, max_tokens=st.integers(1, 14), ignore_eos=st.booleans(), whole=st.booleans())
    def submit_decode(self, prompt: tuple[int, ...], max_tokens: int, ignore_eos: bool, whole: bool) -> None:
        kind = CompleteRequest if whole else DecodeRequest
        id_ = self.next_id()
        self.submit(kind(id=id_, prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, ignore_eos=ignore_eos))

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def arrive(self, data: st.DataObject) -> None:
        """A transfer: writes what the prefix cache did not have, and the decode goes on."""
        id_ = data.draw(st.sampled_from(self.waiting()))
        prompt = self.requests[id_].prompt
        self.write(id_, list(prompt), self.reserved[id_].cached_tokens)
        self.computed[id_] = len(prompt)
        self.take(self.scheduler.resume(id_, next_token(list(prompt)), 0.0))

    @precondition(lambda self: self.waiting())
    @rule(data=st.data())
    def fail_to_arrive(self, data: st.DataObject) -> None:
        """A transfer that is given up when it has written half of its pages, and wrong bytes into the others."""
        id_ = data.draw(st.sampled_from(self.waiting()))
        prompt = self.requests[id_].prompt
        cached = self.reserved[id_].cached_tokens
        self.write(id_, list(prompt[: len(prompt) // 2]) + [JUNK] * (len(prompt) - len(prompt) // 2), cached)
        self.release(id_)

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release_any(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(damaged=st.sampled_from([None] * 9 + [0, 1]))
    def step(self, damaged: int | None) -> None:
        self.take(self.scheduler.admit())
        runs = self.scheduler.schedule()
        self.check_budgets(runs)
        samples = [sample for number, run in enumerate(runs) for sample in self.compute(run, number == damaged)]
        self.take(self.scheduler.complete(runs, samples))

    @rule()
    def empty_cache(self) -> None:
        self.scheduler.empty_cache()
        assert self.pool.statistics().num_kept == 0

    @property
    def is_flying(self) -> bool:
        """A step is under way between two rules."""
        return False

    # ---- the model and its memory

    def compute(self, run: Run, damaged: bool) -> list[Sample | None]:
        """Store the run's tokens, then read all that each row sees."""
        request = self.requests[run.id]
        known = [*request.prompt, *self.generated[run.id]]
        assert run.start == self.computed[run.id]
        self.write(run.id, known[: run.start] + list(run.tokens), run.start)
        seen = [token for page in run.pages for token in self.memory[page]][: run.end]
        assert seen[: run.start] == known[: run.start], "state that is not this request's"
        own = self.reserved[run.id].pages
        assert run.pages == own[: len(run.pages)]
        assert len(run.pages) >= -(-run.end // BLOCK)
        samples: list[Sample | None] = []
        for row in range(len(run.tokens) - run.num_choices, len(run.tokens)):
            samples.append(None if damaged else Sample(next_token(seen[: run.start + row + 1]), 0.0))
        if not isinstance(request, DecodeRequest) and request.prompt_top is not None and not self.generated[run.id]:
            assert run.targets == request.prompt[run.start + 1 : run.end + 1]
        return samples

    def write(self, id_: RequestId, tokens: list[int], start: int) -> None:
        """Store ``tokens`` from position ``start`` on, in pages that are nobody else's."""
        for position in range(start, len(tokens)):
            page = self.reserved[id_].pages[position // BLOCK]
            assert self.pool.is_writable(page), f"page {page} of block {position // BLOCK} is shared, or kept"
            self.memory[page][position % BLOCK] = tokens[position]

    def check_budgets(self, runs: list[Run]) -> None:
        assert len({run.id for run in runs}) == len(runs)
        decodes = [run for run in runs if self.generated[run.id]]
        prompts = [run for run in runs if not self.generated[run.id]]
        assert len(decodes) <= BATCH
        assert sum(len(run.tokens) for run in prompts) <= CHUNK
        for run in decodes:
            request = self.requests[run.id]
            assert not isinstance(request, PrefillRequest)
            assert run.tokens[0] == self.generated[run.id][-1]
            assert run.num_drafts == len(run.tokens) - 1 <= DRAFTS
            assert len(self.generated[run.id]) + len(run.tokens) <= request.max_tokens
        for run in prompts:
            request = self.requests[run.id]
            assert not isinstance(request, DecodeRequest), "nothing runs without its state"
            assert run.tokens == request.prompt[run.start : run.end]
            assert (run.sampling is not None) == (run.end == len(request.prompt))

    # ---- what is told

    def take(self, events: list[EngineEvent]) -> None:
        for event in singly(events):
            assert event.id not in self.ended, f"{event} after the end"
            request, generated = self.requests[event.id], self.generated[event.id]
            match event:
                case PagesReserved(id=id_):
                    assert self.queue.pop(0) == id_, "first come, first served"
                    self.reserved[id_] = event
                    self.computed[id_] = event.cached_tokens
                    self.check_cached(event)
                case PrefillProgress(id=id_, tokens_done=done):
                    assert done > self.computed[id_]
                    self.computed[id_] = done
                case PrefillFinished(token=token) | TokenGenerated(token=token):
                    if generated:
                        self.computed[event.id] += 1
                    generated.append(token)
                case RequestFinished(reason=reason):
                    assert not isinstance(request, PrefillRequest)
                    assert generated == answer(request.prompt, request.max_tokens, ignore_eos=request.ignore_eos)
                    is_stop = generated[-1] == EOS and not request.ignore_eos
                    assert reason == (FinishReason.STOP if is_stop else FinishReason.LENGTH)
                    self.end(event.id)
                case RequestRefused(id=id_):
                    if id_ in self.queue:
                        self.queue.remove(id_)
                    self.end(id_)

    def check_cached(self, reserved: PagesReserved) -> None:
        request = self.requests[reserved.id]
        assert reserved.cached_tokens % BLOCK == 0
        assert reserved.cached_tokens < len(request.prompt), "the last prompt token is always computed"
        if not isinstance(request, DecodeRequest) and request.prompt_top is not None:
            assert reserved.cached_tokens == 0

    def end(self, id_: RequestId) -> None:
        self.ended.add(id_)
        self.reserved.pop(id_, None)

    def release(self, id_: RequestId) -> None:
        self.scheduler.release(id_)
        self.end(id_)
        if id_ in self.queue:
            self.queue.remove(id_)

    def waiting(self) -> list[RequestId]:
        held = sorted(self.reserved)
        return [id_ for id_ in held if isinstance(self.requests[id_], DecodeRequest) and not self.generated[id_]]

    # ---- what always holds

    @invariant()
    def pages_that_are_held_are_not_free(self) -> None:
        held = {page for reserved in self.reserved.values() for page in reserved.pages}
        assert not {0, NUM_PAGES + 1} & held, "the probe's pages"
        assert self.pool.num_free <= self.pool.num_usable - len(held)
        if not self.reserved and not self.is_flying:
            assert self.pool.num_free == self.pool.num_usable

    @invariant()
    def a_page_has_two_holders_only_where_both_took_it_from_the_cache_or_one_gave_it(self) -> None:
        for reserved in self.reserved.values():
            for block, page in enumerate(reserved.pages):
                if block * BLOCK >= self.computed[reserved.id]:
                    assert self.pool.is_writable(page)

    @invariant()
    def counts_add_up(self) -> None:
        s = self.scheduler.statistics()
        assert s.num_queued == len(self.queue)
        running = s.num_prefilling + s.num_holding + s.num_waiting_for_state + s.num_decoding
        assert running == len(self.reserved)
        assert s.num_waiting_for_state == len(self.waiting())
        assert 0 <= s.num_drafts_accepted <= s.num_drafts

    def teardown(self) -> None:
        """However it stands, it can be brought to an end: no deadlock, nothing left, every answer right."""
        for _ in range(400):
            for id_ in self.waiting():
                self.write(id_, list(self.requests[id_].prompt), self.reserved[id_].cached_tokens)
                self.computed[id_] = len(self.requests[id_].prompt)
                self.take(self.scheduler.resume(id_, next_token(list(self.requests[id_].prompt)), 0.0))
            for id_ in sorted(self.reserved):
                if isinstance(self.requests[id_], PrefillRequest) and self.generated[id_]:
                    self.release(id_)
            if not (self.is_flying or self.scheduler.can_run or self.scheduler.can_admit or self.waiting()):
                break
            self.step(None)
        assert not self.queue
        assert not self.reserved
        assert set(self.requests) == self.ended
        assert self.pool.num_free == self.pool.num_usable
        self.scheduler.empty_cache()
        assert self.pool.statistics().largest_run == NUM_PAGES


SchedulerHistories.TestCase.settings = settings(max_examples=150, stateful_step_count=40)
TestSchedulerHistories = SchedulerHistories.TestCase
