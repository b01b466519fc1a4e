"""The scheduler, scripted: who gets pages, who runs, what is told. Random histories are in a file of their own."""

import pytest

from pdkv.errors import RequestError
from pdkv.m3.prefix_cache import BlockNames
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


def test_batch_invariant_steps_are_of_one_prompt_or_of_decodes_in_turn() -> None:
    """Whose chunk it is, and how long, hangs on nobody else. Neither decodes nor prompts wait for the others' end."""
    scheduler, _ = make(num_pages=30, batch_invariant=1)
    scheduler.submit(undivided(1, 4, max_tokens=9))
    scheduler.submit(undivided(2, 14))
    scheduler.submit(undivided(3, 2))
    shape = []
    for _ in range(9):
        runs, _ = step(scheduler)
        shape.append([(run.id[-1], run.start, len(run.tokens)) for run in runs])
    assert shape == [
        [(1, 0, 4)],
        [(2, 0, 6)],
        [(1, 4, 1)],
        [(2, 6, 6)],
        [(1, 5, 1)],
        [(2, 12, 2)],
        [(1, 6, 1), (2, 14, 1)],
        [(3, 0, 2)],
        [(1, 7, 1), (2, 15, 1)],
    ]


def test_batch_invariant_steps_take_no_proposals_and_nothing_from_a_cache() -> None:
    for changed in ({"speculative_tokens": 2}, {"prefix_seed": b"seed"}):
        with pytest.raises(ValueError, match="batch-invariant steps have no proposals and take nothing from a cache"):
            EngineSettings(max_model_len=10, batch_invariant=True, **changed)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("bad", [-1, VOCAB, 1 << 33])
def test_a_prompt_outside_the_vocabulary_is_refused(bad: int) -> None:
    scheduler, _ = make()
    request = DecodeRequest(id=rid(1), prompt=(VOCAB - 1, bad, 0), max_tokens=2, sampling=GREEDY)
    assert scheduler.submit(request) == [
        RequestRefused(rid(1), f"prompt token {bad} is outside the vocabulary of {VOCAB}", never=True)
    ]


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


CACHED = b"seed"


def caching(num_pages: int = 10, **changed: int) -> tuple[Scheduler, PagePool]:
    pool = PagePool(num_pages)
    values = {"max_model_len": 100, "prefill_chunk": 50, "max_batch": 4, **changed}
    bounds = TokenBounds(block_size=BLOCK, vocab_size=VOCAB, eos_tokens=frozenset({EOS}))
    return Scheduler(pool, EngineSettings(prefix_seed=CACHED, **values), bounds), pool


def ended(scheduler: Scheduler, request: EngineRequest, token: int = 1) -> PagesReserved:
    """Submit a prefill, compute it, let it go."""
    (reserved,) = scheduler.submit(request)
    while scheduler.can_run:
        step(scheduler, token)
    scheduler.release(request.id)
    assert isinstance(reserved, PagesReserved)
    return reserved


@pytest.mark.parametrize(
    ("num_tokens", "num_cached"), [(1, 0), (3, 0), (4, 0), (5, 4), (8, 4), (9, 8), (13, 8), (12, 8)]
)
def test_a_prompt_takes_the_full_blocks_before_its_last_token(num_tokens: int, num_cached: int) -> None:
    scheduler, pool = caching()
    first = ended(scheduler, prefill(1, 11))
    assert first.cached_tokens == 0
    (reserved,) = scheduler.submit(prefill(2, num_tokens))
    assert isinstance(reserved, PagesReserved)
    assert reserved.cached_tokens == num_cached
    assert reserved.pages[: num_cached // BLOCK] == first.pages[: num_cached // BLOCK]
    runs, _ = step(scheduler)
    assert [(run.start, run.end) for run in runs] == [(num_cached, num_tokens)]
    scheduler.release(rid(2))
    assert pool.num_free == pool.num_usable


def test_a_prompt_that_is_scored_is_computed_whole() -> None:
    scheduler, _ = caching()
    ended(scheduler, prefill(1, 11))
    scored = PrefillRequest(id=rid(2), prompt=prefill(1, 11).prompt, sampling=GREEDY, prompt_top=0)
    assert ended(scheduler, scored).cached_tokens == 0


def test_what_was_never_computed_to_its_end_is_not_kept() -> None:
    scheduler, pool = caching(prefill_chunk=8)
    scheduler.submit(prefill(1, 20))
    step(scheduler)
    scheduler.release(rid(1))
    scheduler.submit(decode(2, 12))
    scheduler.release(rid(2))  # its transfer failed
    assert pool.statistics().num_kept == 0


def test_damage_empties_the_cache_and_keeps_it_so() -> None:
    scheduler, pool = caching()
    ended(scheduler, prefill(1, 11))
    scheduler.submit(prefill(2, 20))
    scheduler.submit(prefill(3, 9))
    runs = scheduler.schedule()
    events = scheduler.complete(runs, [None, Sample(1, 0.0)])
    assert [type(event) for event in events] == [PrefillProgress, RequestRefused, PrefillProgress, PrefillFinished]
    scheduler.release(rid(3))
    assert pool.statistics().num_kept == 0
    assert pool.num_free == pool.num_usable


def test_arrived_prompts_and_accepted_tokens_are_kept_where_they_decode() -> None:
    scheduler, pool = caching()
    request = decode(1, 7, max_tokens=8)
    scheduler.submit(request)
    scheduler.resume(rid(1), 20, 0.0)
    assert pool.statistics().num_kept == 1
    for token in (21, 22, 23):
        step(scheduler, token)
    assert pool.statistics().num_kept == 2
    scheduler.release(rid(1))
    again = DecodeRequest(id=rid(2), prompt=(*request.prompt, 20, 21, 22), max_tokens=1, sampling=GREEDY)
    (reserved,) = scheduler.submit(again)
    assert isinstance(reserved, PagesReserved)
    assert reserved.cached_tokens == 8


def test_a_prompt_computed_twice_at_once_is_kept_once() -> None:
    scheduler, pool = caching()
    scheduler.submit(prefill(1, 9))
    scheduler.submit(prefill(2, 17))
    step(scheduler)
    assert pool.statistics().num_kept == 4
    scheduler.release(rid(1))
    assert pool.num_free == pool.num_usable - 7, "five pages of its own and two that came first"
    scheduler.release(rid(2))
    assert pool.num_free == pool.num_usable
    assert ended(scheduler, prefill(3, 18)).cached_tokens == 16


def test_kept_pages_make_room_before_anybody_waits() -> None:
    scheduler, pool = caching(num_pages=6)
    ended(scheduler, prefill(1, 16))
    assert pool.statistics().num_kept == 4
    assert [type(event) for event in scheduler.submit(undivided(2, 1, max_tokens=19))] == [PagesReserved]
    assert scheduler.submit(prefill(3, 9)) == []
    scheduler.release(rid(2))
    assert [type(event) for event in scheduler.admit()] == [PagesReserved]


def speculating(**changed: int) -> tuple[Scheduler, PagePool]:
    return caching(speculative_tokens=3, **changed)


def begun(scheduler: Scheduler, max_tokens: int, *, ignore_eos: bool = True) -> Run:
    """A decode after 1 2 3 4 EOS 1 2 3, whose prompt ends with 2 and whose first token is 3."""
    request = DecodeRequest(
        id=rid(1), prompt=(1, 2, 3, 4, EOS, 1, 2), max_tokens=max_tokens, sampling=GREEDY, ignore_eos=ignore_eos
    )
    scheduler.submit(request)
    scheduler.resume(rid(1), 3, 0.0)
    (run,) = scheduler.schedule()
    return run


def tokens_told(scheduler: Scheduler, run: Run, *tokens: int) -> list[int]:
    events = scheduler.complete([run], [Sample(token, 0.0) for token in tokens])
    return [event.token for event in events if isinstance(event, TokenGenerated)]


def test_proposals_are_accepted_up_to_the_first_that_differs() -> None:
    scheduler, _ = speculating()
    run = begun(scheduler, 20)
    assert (run.tokens, run.start, run.num_drafts) == ((3, 4, EOS, 1), 7, 3)
    assert run.wanted_rows == (0, 1, 2, 3)
    assert tokens_told(scheduler, run, 4, 8, 30, 31) == [4, 8]
    (run,) = scheduler.schedule()
    assert (run.tokens, run.start) == ((8,), 9), "what was stored for the others is overwritten"
    statistics = scheduler.statistics()
    assert (statistics.num_drafts, statistics.num_drafts_accepted) == (3, 1)


def test_all_proposals_may_be_right_and_one_more_token_comes() -> None:
    scheduler, _ = speculating()
    run = begun(scheduler, 20)
    assert tokens_told(scheduler, run, 4, EOS, 1, 40) == [4, EOS, 1, 40]
    (run,) = scheduler.schedule()
    assert (run.tokens, run.start) == ((40,), 11)


@pytest.mark.parametrize(("max_tokens", "num_drafts"), [(2, 0), (3, 1), (4, 2), (5, 3), (9, 3)])
def test_no_more_is_proposed_than_may_be_generated(max_tokens: int, num_drafts: int) -> None:
    scheduler, pool = speculating()
    run = begun(scheduler, max_tokens)
    assert run.num_drafts == num_drafts
    told = tokens_told(scheduler, run, *(4, EOS, 1, 5)[: num_drafts + 1])
    assert len(told) == num_drafts + 1
    if max_tokens <= 5:
        assert pool.num_free == pool.num_usable


def test_an_end_among_the_proposals_is_the_end() -> None:
    scheduler, pool = speculating()
    run = begun(scheduler, 20, ignore_eos=False)
    events = scheduler.complete([run], [Sample(token, 0.0) for token in (4, EOS, 1, 2)])
    assert [type(event) for event in events] == [TokenGenerated, TokenGenerated, RequestFinished]
    assert events[-1] == RequestFinished(rid(1), FinishReason.STOP)
    assert pool.num_free == pool.num_usable


def test_output_that_is_not_finite_counts_only_where_it_is_reached() -> None:
    scheduler, _ = speculating()
    run = begun(scheduler, 20)
    assert scheduler.complete([run], [Sample(7, 0.0), None, None, None]) == [TokenGenerated(rid(1), 7, 0.0)]
    scheduler, _ = speculating()
    run = begun(scheduler, 20)
    events = scheduler.complete([run], [Sample(4, 0.0), None, None, None])
    assert [type(event) for event in events] == [TokenGenerated, RequestRefused]


def test_rejected_proposals_are_not_kept_although_they_fill_a_page() -> None:
    scheduler, pool = speculating()
    prompt = (7, 1, 2, 3, 4, EOS, 1, 2)
    scheduler.submit(DecodeRequest(id=rid(1), prompt=prompt, max_tokens=20, sampling=GREEDY, ignore_eos=True))
    scheduler.resume(rid(1), 3, 0.0)
    (run,) = scheduler.schedule()
    assert (run.end, run.num_drafts) == (12, 3)
    assert tokens_told(scheduler, run, 4, EOS, 8, 0) == [4, EOS, 8]
    wrong, right = [*prompt, *run.tokens], [*prompt, 3, 4, EOS, 8]
    assert pool.statistics().num_kept == 2
    (run,) = scheduler.schedule()
    scheduler.complete([run], [Sample(5, 0.0)] * run.num_choices)
    assert pool.find(BlockNames(CACHED, BLOCK).first(3, wrong)) == (0, 1)
    assert pool.find(BlockNames(CACHED, BLOCK).first(3, right)) == (0, 1, 2)
