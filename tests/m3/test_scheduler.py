"""The scheduler under scripted and random histories: nothing leaks, nothing is shared, everything ends once."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pdkv.errors import RequestError
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
)
from pdkv.m3.run import Run, TokenBounds
from pdkv.m3.sampling import Sample, SamplingParams
from pdkv.m3.scheduler import Scheduler
from pdkv.memory.pages import PagePool

BLOCK = 4
VOCAB = 50
EOS = 9
GREEDY = SamplingParams()


def make(num_pages: int = 10, **changed: int) -> tuple[Scheduler, PagePool]:
    pool = PagePool(num_pages + 2, reserved=(0, num_pages + 1))
    values = {"max_model_len": 100, "prefill_chunk": 6, "max_batch": 2, **changed}
    bounds = TokenBounds(block_size=BLOCK, vocab_size=VOCAB, eos_tokens=frozenset({EOS}))
    return Scheduler(pool, EngineSettings(**values), bounds), pool


def rid(number: int) -> RequestId:
    return RequestId(number.to_bytes(16, "big"))


def prefill(number: int, num_tokens: int) -> PrefillRequest:
    return PrefillRequest(id=rid(number), prompt=tuple(range(10, 10 + num_tokens)), sampling=GREEDY)


def decode(number: int, num_prompt: int, max_tokens: int = 4, *, ignore_eos: bool = False) -> DecodeRequest:
    return DecodeRequest(
        id=rid(number), prompt=(1,) * num_prompt, max_tokens=max_tokens, sampling=GREEDY, ignore_eos=ignore_eos
    )


def undivided(number: int, num_tokens: int, max_tokens: int = 4, *, ignore_eos: bool = False) -> CompleteRequest:
    prompt = tuple(range(10, 10 + num_tokens))
    return CompleteRequest(id=rid(number), prompt=prompt, max_tokens=max_tokens, sampling=GREEDY, ignore_eos=ignore_eos)


def step(scheduler: Scheduler, token: int = 1) -> tuple[list[Run], list[EngineEvent]]:
    runs = scheduler.schedule()
    return runs, scheduler.complete(runs, [Sample(token, -0.5) for run in runs if run.sampling is not None])


def test_an_undivided_request_runs_in_chunks_and_then_token_by_token() -> None:
    scheduler, pool = make()
    request = undivided(1, 8, max_tokens=3)
    (reserved,) = scheduler.submit(request)
    assert reserved == PagesReserved(rid(1), (1, 2, 3))  # 8 + 3 tokens in blocks of 4
    runs, events = step(scheduler)
    assert runs == [Run(id=rid(1), tokens=request.prompt[:6], start=0, pages=(1, 2), sampling=None)]
    assert events == [PrefillProgress(rid(1), 6)]
    runs, events = step(scheduler, token=20)
    assert runs == [Run(id=rid(1), tokens=request.prompt[6:], start=6, pages=(1, 2), sampling=GREEDY)]
    assert events == [PrefillProgress(rid(1), 8), TokenGenerated(rid(1), 20, -0.5)]
    runs, events = step(scheduler, token=21)
    assert runs == [Run(id=rid(1), tokens=(20,), start=8, pages=(1, 2, 3), sampling=GREEDY)]
    assert events == [TokenGenerated(rid(1), 21, -0.5)]
    runs, events = step(scheduler, token=22)
    assert runs == [Run(id=rid(1), tokens=(21,), start=9, pages=(1, 2, 3), sampling=GREEDY)]
    assert events == [TokenGenerated(rid(1), 22, -0.5), RequestFinished(rid(1), FinishReason.LENGTH)]
    assert pool.num_free == pool.num_usable
    assert not scheduler.can_run


def test_a_prefill_keeps_its_pages_until_release() -> None:
    scheduler, pool = make()
    assert scheduler.submit(prefill(1, 5)) == [PagesReserved(rid(1), (1, 2))]
    _, events = step(scheduler, token=EOS)
    assert events == [PrefillProgress(rid(1), 5), PrefillFinished(rid(1), EOS, -0.5)]
    assert not scheduler.can_run
    assert scheduler.statistics().num_holding == 1
    assert pool.num_free == pool.num_usable - 2
    scheduler.release(rid(1))
    scheduler.release(rid(1))
    assert pool.num_free == pool.num_usable


def test_a_decode_waits_for_its_state_and_holds_no_slot() -> None:
    scheduler, _ = make(max_batch=1)
    scheduler.submit(decode(1, 4))
    scheduler.submit(decode(2, 4))
    assert scheduler.schedule() == []
    assert scheduler.resume(rid(2), 30, -1.0) == [TokenGenerated(rid(2), 30, -1.0)]
    runs, _ = step(scheduler)
    assert [(run.id, run.tokens, run.start) for run in runs] == [(rid(2), (30,), 4)]
    assert scheduler.statistics().num_waiting_for_state == 1


def test_decodes_beyond_the_batch_wait_for_a_slot_in_order() -> None:
    scheduler, _ = make(max_batch=2)
    for number in (1, 2, 3):
        scheduler.submit(decode(number, 4, max_tokens=2))
    for number in (3, 1, 2):
        scheduler.resume(rid(number), 30, 0.0)
    runs, _ = step(scheduler)
    assert [run.id for run in runs] == [rid(3), rid(1)]
    runs, _ = step(scheduler)
    assert [run.id for run in runs] == [rid(2)]


@pytest.mark.parametrize(
    ("token", "max_tokens", "ignore_eos", "reason"),
    [
        (EOS, 5, False, FinishReason.STOP),
        (EOS, 1, False, FinishReason.STOP),
        (EOS, 1, True, FinishReason.LENGTH),
        (3, 1, False, FinishReason.LENGTH),
    ],
)
def test_a_first_token_that_is_the_last_finishes_at_once(
    token: int, max_tokens: int, ignore_eos: bool, reason: FinishReason
) -> None:
    scheduler, pool = make()
    scheduler.submit(decode(1, 7, max_tokens, ignore_eos=ignore_eos))
    assert scheduler.resume(rid(1), token, -2.0) == [
        TokenGenerated(rid(1), token, -2.0),
        RequestFinished(rid(1), reason),
    ]
    assert pool.num_free == pool.num_usable
    assert scheduler.resume(rid(1), token, -2.0) == []


def test_eos_ends_a_decode_unless_it_is_ignored() -> None:
    scheduler, _ = make()
    scheduler.submit(undivided(1, 4, max_tokens=9))
    scheduler.submit(undivided(2, 2, max_tokens=9, ignore_eos=True))
    _, events = step(scheduler, token=EOS)
    assert [e for e in events if isinstance(e, RequestFinished)] == [RequestFinished(rid(1), FinishReason.STOP)]
    assert scheduler.statistics().num_decoding == 1


def test_a_first_token_outside_the_vocabulary_is_refused() -> None:
    scheduler, pool = make()
    scheduler.submit(decode(1, 7))
    (event,) = scheduler.resume(rid(1), VOCAB, 0.0)
    assert isinstance(event, RequestRefused)
    assert f"token {VOCAB}" in event.message
    assert pool.num_free == pool.num_usable


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        (prefill(1, 0), "empty"),
        (decode(1, 0), "empty"),
        (decode(1, 5, max_tokens=0), "max_tokens"),
        (PrefillRequest(id=rid(1), prompt=(1, VOCAB), sampling=GREEDY), f"token {VOCAB}"),
        (PrefillRequest(id=rid(1), prompt=(-1,), sampling=GREEDY), "token -1"),
        (decode(1, 30, max_tokens=3), "context of 32"),
        (decode(1, 20, max_tokens=5), "7 pages"),
    ],
)
def test_what_can_never_be_served_is_refused(request_: EngineRequest, says: str) -> None:
    scheduler, _ = make(num_pages=6, max_model_len=32)
    (event,) = scheduler.submit(request_)
    assert isinstance(event, RequestRefused)
    assert event.never
    assert says in event.message
    assert not scheduler.can_run
    assert not scheduler.can_admit


def test_what_just_fits_is_served() -> None:
    scheduler, pool = make(num_pages=8, max_model_len=32)
    assert scheduler.submit(decode(1, 30, max_tokens=2)) == [PagesReserved(rid(1), tuple(range(1, 9)))]
    scheduler.release(rid(1))
    assert scheduler.submit(prefill(2, 31)) == [PagesReserved(rid(2), tuple(range(1, 9)))]
    assert pool.num_free == 0


def test_a_full_queue_refuses_for_now() -> None:
    scheduler, _ = make(max_queued=1)
    scheduler.submit(decode(1, 36))
    assert scheduler.submit(decode(2, 4)) == []
    (event,) = scheduler.submit(decode(3, 4))
    assert isinstance(event, RequestRefused)
    assert not event.never


def test_an_id_in_use_is_an_error() -> None:
    scheduler, _ = make()
    scheduler.submit(decode(1, 4))
    with pytest.raises(RequestError, match="in use"):
        scheduler.submit(decode(1, 4))


def test_nobody_overtakes_a_big_request() -> None:
    scheduler, _ = make()
    scheduler.submit(decode(1, 4))
    assert scheduler.submit(decode(2, 36)) == []
    assert scheduler.submit(decode(3, 1, 1)) == []
    assert not scheduler.can_admit
    scheduler.release(rid(1))
    assert scheduler.can_admit
    assert [event.id for event in scheduler.admit()] == [rid(2)]
    scheduler.release(rid(2))
    assert [event.id for event in scheduler.admit()] == [rid(3)]


def test_pages_of_a_finished_request_go_to_the_next_at_once() -> None:
    scheduler, _ = make()
    scheduler.submit(undivided(1, 4, max_tokens=1))
    assert scheduler.submit(decode(2, 36)) == []
    _, events = step(scheduler)
    assert [type(event) for event in events[-2:]] == [RequestFinished, PagesReserved]
    scheduler.release(rid(2))
    scheduler.submit(decode(3, 4, max_tokens=1))
    assert scheduler.submit(decode(4, 36)) == []
    events = scheduler.resume(rid(3), 1, 0.0)
    assert [type(event) for event in events[-2:]] == [RequestFinished, PagesReserved]


def test_a_queued_request_can_be_released() -> None:
    scheduler, _ = make()
    scheduler.submit(decode(1, 36))
    scheduler.submit(decode(2, 36))
    scheduler.submit(decode(3, 1, 1))
    scheduler.release(rid(2))
    scheduler.release(rid(1))
    assert [event.id for event in scheduler.admit()] == [rid(3)]


def test_one_chunk_budget_serves_several_prompts() -> None:
    scheduler, _ = make(prefill_chunk=6)
    for number in (1, 2, 3):
        scheduler.submit(prefill(number, 4))
    runs, _ = step(scheduler)
    assert [(run.id, run.start, run.end) for run in runs] == [(rid(1), 0, 3), (rid(2), 0, 3)]
    runs, _ = step(scheduler)
    assert [(run.id, run.start, run.end) for run in runs] == [(rid(1), 3, 4), (rid(2), 3, 4), (rid(3), 0, 4)]


class SchedulerHistories(RuleBasedStateMachine):
    """Any history of submits, resumes, releases and steps, with a runner that answers what hypothesis likes."""

    def __init__(self) -> None:
        super().__init__()
        self.scheduler, self.pool = make()
        self.requests: dict[RequestId, EngineRequest] = {}
        self.queue: list[RequestId] = []
        self.pages: dict[RequestId, tuple[int, ...]] = {}
        self.computed: dict[RequestId, int] = {}
        self.generated: dict[RequestId, list[int]] = {}
        self.ended: set[RequestId] = set()
        self.count = 0

    def submit(self, request: EngineRequest) -> None:
        self.requests[request.id] = request
        self.queue.append(request.id)
        self.generated[request.id] = []
        self.computed[request.id] = len(request.prompt) if isinstance(request, DecodeRequest) else 0
        self.take(self.scheduler.submit(request))

    def next_id(self) -> int:
        self.count += 1
        return self.count

    @rule(num_tokens=st.integers(1, 44))
    def submit_prefill(self, num_tokens: int) -> None:
        self.submit(PrefillRequest(id=rid(self.next_id()), prompt=(1,) * num_tokens, sampling=GREEDY))

    @rule(num_tokens=st.integers(1, 40), max_tokens=st.integers(1, 6), ignore_eos=st.booleans())
    def submit_decode(self, num_tokens: int, max_tokens: int, ignore_eos: bool) -> None:
        self.submit(decode(self.next_id(), num_tokens, max_tokens, ignore_eos=ignore_eos))

    @rule(num_tokens=st.integers(1, 40), max_tokens=st.integers(1, 6), ignore_eos=st.booleans())
    def submit_undivided(self, num_tokens: int, max_tokens: int, ignore_eos: bool) -> None:
        self.submit(undivided(self.next_id(), num_tokens, max_tokens, ignore_eos=ignore_eos))

    @precondition(lambda self: self.waiting())
    @rule(data=st.data(), token=st.sampled_from([1, 2, EOS]))
    def resume(self, data: st.DataObject, token: int) -> None:
        self.take(self.scheduler.resume(data.draw(st.sampled_from(self.waiting())), token, 0.0))

    @precondition(lambda self: self.requests)
    @rule(data=st.data())
    def release_any(self, data: st.DataObject) -> None:
        self.release(data.draw(st.sampled_from(sorted(self.requests))))

    @rule(tokens=st.lists(st.sampled_from([1, 2, EOS]), min_size=9, max_size=9))
    def step(self, tokens: list[int]) -> None:
        self.take(self.scheduler.admit())
        runs = self.scheduler.schedule()
        self.check_runs(runs)
        wanted = [run for run in runs if run.sampling is not None]
        events = self.scheduler.complete(runs, [Sample(t, 0.0) for t, _ in zip(tokens, wanted, strict=False)])
        for run in runs:
            self.computed[run.id] = run.end
        self.take(events)

    def check_runs(self, runs: list[Run]) -> None:
        assert len({run.id for run in runs}) == len(runs)
        num_decodes = num_prompt_tokens = 0
        for run in runs:
            request, start = self.requests[run.id], self.computed[run.id]
            assert run.start == start
            assert run.pages == self.pages[run.id][: -(-run.end // BLOCK)]
            assert len(run.pages) == -(-run.end // BLOCK), "room for every token of the run"
            if self.generated[run.id]:
                num_decodes += 1
                assert run.tokens == (self.generated[run.id][-1],)
                assert run.sampling is not None
            else:
                assert not isinstance(request, DecodeRequest), "nothing runs without its state"
                num_prompt_tokens += len(run.tokens)
                assert run.tokens == request.prompt[start : run.end]
                assert (run.sampling is not None) == (run.end == len(request.prompt))
        assert num_decodes <= 2
        assert num_prompt_tokens <= 6

    def take(self, events: list[EngineEvent]) -> None:
        for event in events:
            assert event.id not in self.ended, f"{event} after the end"
            match event:
                case PagesReserved(id=id_, pages=pages):
                    assert self.queue.pop(0) == id_, "first come, first served"
                    self.pages[id_] = pages
                case PrefillProgress(id=id_, tokens_done=done):
                    assert done == self.computed[id_]
                case PrefillFinished(id=id_, token=token) | TokenGenerated(id=id_, token=token):
                    self.generated[id_].append(token)
                case RequestFinished(id=id_, reason=reason):
                    self.check_end(id_, reason)
                    self.ended.add(id_)
                    del self.pages[id_]
                case RequestRefused(id=id_):
                    self.queue.remove(id_)
                    self.ended.add(id_)

    def check_end(self, id_: RequestId, reason: FinishReason) -> None:
        request, tokens = self.requests[id_], self.generated[id_]
        assert not isinstance(request, PrefillRequest)
        if reason is FinishReason.STOP:
            assert tokens[-1] == EOS
            assert not request.ignore_eos
        else:
            assert len(tokens) == request.max_tokens
        assert request.ignore_eos or EOS not in tokens[:-1]

    def waiting(self) -> list[RequestId]:
        return [
            id_
            for id_ in sorted(self.pages)
            if isinstance(self.requests[id_], DecodeRequest) and not self.generated[id_]
        ]

    def release(self, id_: RequestId) -> None:
        self.scheduler.release(id_)
        self.ended.add(id_)
        self.pages.pop(id_, None)
        if id_ in self.queue:
            self.queue.remove(id_)

    @invariant()
    def pages_are_neither_shared_nor_leaked(self) -> None:
        held = [page for pages in self.pages.values() for page in pages]
        assert len(set(held)) == len(held)
        assert not {0, 11} & set(held), "the probe's pages"
        assert self.pool.num_free == self.pool.num_usable - len(held)

    @invariant()
    def counts_add_up(self) -> None:
        s = self.scheduler.statistics()
        assert s.num_queued == len(self.queue)
        total = s.num_prefilling + s.num_holding + s.num_waiting_for_state + s.num_decoding
        assert total == len(self.pages)
        assert s.num_waiting_for_state == len(self.waiting())

    def teardown(self) -> None:
        """However it stands, it can be brought to an end: no deadlock, nothing left."""
        for _ in range(400):
            for id_ in self.waiting():
                self.take(self.scheduler.resume(id_, 1, 0.0))
            for id_ in sorted(self.pages):
                if isinstance(self.requests[id_], PrefillRequest) and self.generated[id_]:
                    self.release(id_)
            if not (self.scheduler.can_run or self.scheduler.can_admit or self.waiting()):
                break
            self.step([1] * 9)
        assert not self.queue
        assert not self.pages
        assert set(self.requests) == self.ended
        assert self.pool.num_free == self.pool.num_usable


SchedulerHistories.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestSchedulerHistories = SchedulerHistories.TestCase
