"""The scheduler: who holds pages and who runs in the next step; numbers only, never a tensor."""

from array import array
from collections import deque
from collections.abc import Sequence as SequenceOf
from itertools import islice

import numpy as np

from pdkv.errors import RequestError
from pdkv.m3.chunks import share_chunk
from pdkv.m3.logprobs import NO_TOP, TopLogprobs
from pdkv.m3.prefix_cache import BlockNames
from pdkv.m3.requests import (
    DecodeRequest,
    EngineEvent,
    EngineRequest,
    EngineSettings,
    EngineStatistics,
    FinishReason,
    PagesReserved,
    PrefillFinished,
    PrefillProgress,
    PrefillRequest,
    RequestFinished,
    RequestId,
    RequestRefused,
    TokenGenerated,
    TokensGenerated,
)
from pdkv.m3.run import NOT_FINITE, Onward, Run, Step, TokenBounds
from pdkv.m3.sampling import NO_TOKEN, Choices, Sample
from pdkv.m3.sequence import Sequence, Stage
from pdkv.m3.under_way import DecodeGroup, UnderWay
from pdkv.memory.pages import PagePool

__all__ = ["NOT_FINITE", "Run", "Scheduler", "TokenBounds"]


_ALL_GO_ON = Onward()


class Scheduler:
    """Continuous batching without preemption. Owned by the engine thread, as is the pool.

    Pages for a request's whole need are held before anything of it runs, strictly in order of arrival: while the oldest
    queued request does not fit, younger ones wait behind it, so a big one is never starved. What runs therefore always
    can finish, and what can never fit is refused on arrival. On a decode worker that need includes the pages that a
    transfer in flight writes to.

    Full pages of computed tokens are kept in the pool under the names of what is in them, and taken from there by
    requests that begin with the same tokens; nobody writes to them again.

    A step is under way from ``schedule`` to ``complete``. A second one may be scheduled behind it: then tokens that the
    first is choosing are not known yet, and what of them ends a request is found when the second is under way already.
    That one computes the request once more, for nothing: its choice is dropped, and the pages are held until it ends.
    """

    def __init__(self, pool: PagePool, settings: EngineSettings, bounds: TokenBounds) -> None:
        self._pool = pool
        self._settings = settings
        self._bounds = bounds
        self._sequences: dict[RequestId, Sequence] = {}
        # Insertion order is order of arrival in that stage.
        self._queue: deque[RequestId] = deque()
        self._prefilling: dict[RequestId, Sequence] = {}
        self._decoding: dict[RequestId, Sequence] = {}
        self._under_way: deque[UnderWay] = deque()
        self._prompts_turn = False
        """Where steps are of one prompt or of decodes: whose the next one is if both want it."""
        self._group: DecodeGroup | None = None
        """Of the latest step, if that was one of a group."""
        self._joining: dict[Sequence, None] = {}
        """Who decodes and is not in the group, in order; known from its second step on."""
        self._is_of_note = np.zeros(bounds.vocab_size + 1, dtype=bool)
        """By token, ``NO_TOKEN`` last: whether it is more than one token of a request that goes on."""
        self._is_of_note[[NO_TOKEN, *(token for token in bounds.eos_tokens if token < bounds.vocab_size)]] = True
        self._num_blocks_found = self._num_blocks_missed = 0
        self._num_drafts = self._num_drafts_accepted = 0

    def submit(self, request: EngineRequest) -> list[EngineEvent]:
        """Queue a request, or refuse it. Raises ``RequestError`` for an id that is in use."""
        if request.id in self._sequences:
            raise RequestError(f"request id {request.id.hex()} is in use", param="id", status=409)
        problem, prompt = _refusal(request, self._settings.max_model_len, self._bounds.vocab_size)
        if problem:
            return [RequestRefused(request.id, problem, never=True)]
        seed, block_size = self._settings.prefix_seed, self._bounds.block_size
        sequence = Sequence(request, prompt, None if seed is None else BlockNames(seed, block_size), block_size)
        if sequence.num_blocks > self._pool.num_usable:
            problem = f"{sequence.num_blocks} pages needed, the arena has {self._pool.num_usable}; give it more pages"
            return [RequestRefused(request.id, problem, never=True)]
        if len(self._queue) >= self._settings.max_queued:
            return [RequestRefused(request.id, f"{len(self._queue)} requests are waiting for pages", never=False)]
        self._sequences[request.id] = sequence
        self._queue.append(request.id)
        return self.admit()

    def admit(self) -> list[EngineEvent]:
        """Reserve pages for queued requests, oldest first, while they fit."""
        events: list[EngineEvent] = []
        while self._queue and self.can_admit:
            sequence = self._sequences[self._queue.popleft()]
            self._take_pages(sequence)
            if isinstance(sequence.request, DecodeRequest):
                sequence.stage = Stage.WAITING_FOR_STATE
            else:
                sequence.stage = Stage.PREFILLING
                self._prefilling[sequence.request.id] = sequence
            events.append(PagesReserved(sequence.request.id, sequence.pages, sequence.num_computed))
        return events

    def resume(self, request_id: RequestId, token: int, logprob: float, top: TopLogprobs = NO_TOP) -> list[EngineEvent]:
        """Start a decode whose prompt state is resident. Harmless for an id that is gone."""
        sequence = self._sequences.get(request_id)
        if sequence is None:
            return []
        request = sequence.request
        assert isinstance(request, DecodeRequest), f"resume of a {type(request).__name__}"
        assert sequence.stage is Stage.WAITING_FOR_STATE, f"resume of a request that is {sequence.stage.value}"
        if not 0 <= token < self._bounds.vocab_size:
            self.release(request_id)
            message = f"first token {token} is outside the vocabulary of {self._bounds.vocab_size}"
            return [RequestRefused(request_id, message, never=True), *self.admit()]
        sequence.num_computed = len(request.prompt)
        events: list[EngineEvent] = []
        self._accept(sequence, Sample(token, logprob, top), events)
        return events + self.admit()

    def release(self, request_id: RequestId) -> None:
        """Forget a request at whatever stage; let go of its pages, as soon as no step under way computes it.
        Idempotent."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return
        if sequence.stage is Stage.QUEUED:
            self._queue.remove(request_id)
        self._prefilling.pop(request_id, None)
        if self._decoding.pop(request_id, None) is not None:
            self._keep(sequence, len(sequence.tokens) - 1)  # a step under way may be at the last one's state
            self._joining.pop(sequence, None)
            if self._group is not None:
                self._group.release(sequence)
        sequence.stage = Stage.RELEASED
        self._free(sequence)

    def empty_cache(self) -> None:
        """Keep nothing for later requests: neither what is kept now nor what running requests hold."""
        self._pool.keep_nothing()
        for sequence in self._sequences.values():
            sequence.keep_nothing()

    def schedule(self) -> Step:
        """The next step: every decode that has a slot, then one chunk of prompt tokens. It is under way until
        ``complete``; ``[]`` is no step.

        Behind a step that is under way: ``[]`` unless that is one of a group and nothing but decodes are to follow.
        """
        if self._under_way:
            first = self._under_way[0]
            if len(self._under_way) > 1 or first.group is None or self._prefilling:
                return []
            return self._schedule_onward(first.group, first.step)
        sequences, prompts = [*self._decoding.values()][: self._settings.max_batch], [*self._prefilling.values()]
        if self._settings.batch_invariant:
            sequences, prompts = self._apart(sequences, prompts)
        most_drafts, overlaps = self._settings.speculative_tokens, self._settings.overlap
        runs = [s.decode_run(most_drafts, tells_all_pages=overlaps) for s in sequences]
        shares = share_chunk([prompt.num_prompt_left for prompt in prompts], self._settings.prefill_chunk)
        for prompt, share in zip(prompts, shares, strict=True):
            if share:
                sequences.append(prompt)
                runs.append(prompt.prompt_run(share))
        for run in runs:
            self._check_writable(run)
        if runs:
            self._begin(sequences, runs, only_decodes=not prompts)
        return runs

    def _apart(self, decodes: list[Sequence], prompts: list[Sequence]) -> tuple[list[Sequence], list[Sequence]]:
        """One of the two, in turn, so that neither waits for the other's end; of prompts the oldest."""
        if not decodes or not prompts:
            return decodes, prompts[:1]
        self._prompts_turn = not self._prompts_turn
        return ([], prompts[:1]) if self._prompts_turn else (decodes, [])

    def _schedule_onward(self, group: DecodeGroup, step: int) -> Step:
        """Who stays goes on behind that step, who can joins."""
        if group.begins_second_step(self._settings.max_batch):
            present = set(group.sequences)
            self._joining = dict.fromkeys([its for its in self._decoding.values() if its not in present])
        left = group.leaving(step)
        onward = _ALL_GO_ON
        if left or self._joining:
            num_free = self._settings.max_batch - len(group.sequences) + len(left)
            joined = list(islice(self._joining, num_free))
            if len(left) == len(group.sequences) and not joined:
                return []
            if left or joined:
                onward = self._give_places(group, step + 1, left, joined)
        beginning = group.beginning(step + 1)
        for sequence, block in beginning:
            self._check_page(sequence.pages[block])
        self._under_way.append(UnderWay(group.sequences, group, step + 1, group.ids, group.to_keep(beginning)))
        return onward

    def _give_places(self, group: DecodeGroup, step: int, left: list[int], joined: list[Sequence]) -> Onward:
        """As from that step on."""
        runs = tuple([its.decode_run(0, tells_all_pages=True) for its in joined])
        for run in runs:
            self._check_writable(run)
        for sequence in joined:
            del self._joining[sequence]
        group.change(step, left, joined)
        return Onward(tuple(left), runs)

    def _begin(self, sequences: list[Sequence], runs: list[Run], *, only_decodes: bool) -> None:
        """A step is under way. What is proposed hangs on tokens: with proposals no step is launched behind another."""
        can_go_on = only_decodes and not self._settings.speculative_tokens
        self._group = None
        if can_go_on:
            assert not self._under_way, "only a group goes on behind a group"
            starts, size = [run.start for run in runs], self._bounds.block_size
            self._group = group = DecodeGroup(sequences, starts, size)
            to_keep = [its for its, start in zip(sequences, starts, strict=True) if start % size == 0]
            self._under_way.append(UnderWay(sequences, group, 0, group.ids, to_keep))
        else:
            self._under_way.append(UnderWay(sequences, None))

    def complete(self, step: Step, samples: SequenceOf[Sample | None] | Choices) -> list[EngineEvent]:
        """Account for the oldest step under way: ``samples`` are ``num_choices`` of each run, in order; ``None`` is
        what cannot be chosen because the model's output is not finite, and ends the request."""
        if not step:
            return self.admit()
        under_way = self._under_way.popleft()
        if isinstance(samples, Choices):
            if under_way.group is not None:
                return self._complete_plainly(under_way, under_way.group, samples)
            samples = samples.samples()
        assert not isinstance(step, Onward), "whoever goes on alone chooses alone"
        events: list[EngineEvent] = []
        num_seen = 0
        for run, sequence in zip(step, under_way.sequences, strict=True):
            assert run.id == sequence.request.id, "steps end in the order in which they were scheduled"
            mine = samples[num_seen : num_seen + run.num_choices]
            num_seen += len(mine)
            if sequence.stage is Stage.PREFILLING:
                sequence.num_computed = run.end
                events.append(PrefillProgress(run.id, run.end))
                if mine:
                    self._accept(sequence, mine[0], events)
            elif run.num_drafts and sequence.stage is Stage.DECODING:
                self._verify(sequence, run, mine, events)
            else:
                self._accept_if_held(sequence, mine[0] if mine else None, events)
        assert num_seen == len(samples), "more samples than runs that wanted one"
        return events + self.admit()

    def _complete_plainly(self, step: UnderWay, group: DecodeGroup, choices: Choices) -> list[EngineEvent]:
        """What ``_accept_if_held`` does, with next to nothing for each of those that just go on. All tokens come
        first."""
        for sequence in step.to_keep:
            if sequence.stage is not Stage.RELEASED:
                self._keep(sequence, len(sequence.tokens))
        tokens, noted = choices.tokens, self._places_of_note(step, group, choices)
        if not noted:
            group.tell(tokens)
            return [TokensGenerated(step.ids, tokens, choices.logprobs, choices.tops), *self.admit()]
        tokens = tokens.copy()
        ends: list[EngineEvent] = []
        for place in noted:
            sequence = step.sequences[place]
            if sequence.stage is Stage.RELEASED:  # its choice is nobody's
                tokens[place] = NO_TOKEN
                self._free(sequence)
            elif tokens[place] == NO_TOKEN:
                ends.append(self._refuse_damaged(sequence))
            else:
                reason = self._take(sequence, int(tokens[place]))
                assert reason is not None, "noted are those that end"
                self.release(sequence.request.id)
                ends.append(RequestFinished(sequence.request.id, reason))
            sequence.stop_following()
        group.tell(tokens)
        told = TokensGenerated(step.ids, tokens, choices.logprobs, choices.tops)
        return [told, *ends, *self.admit()] if tokens.max() != NO_TOKEN else [*ends, *self.admit()]

    def _places_of_note(self, step: UnderWay, group: DecodeGroup, choices: Choices) -> list[int]:
        """Places whose choice is more than one token of a request that goes on: the last, or nobody's, or none."""
        places = [*group.leaving(step.step), *group.released_in(step)]
        is_of_note = self._is_of_note.take(choices.tokens)
        if b"\1" in is_of_note.tobytes():  # quicker than to ask numpy whether there is any
            for place in is_of_note.nonzero()[0].tolist():
                if choices.tokens[place] == NO_TOKEN or not step.sequences[place].ignores_eos:
                    places.append(place)
        return sorted({*places}) if places else places

    @property
    def can_admit(self) -> bool:
        """The oldest queued request fits now."""
        if not self._queue:
            return False
        sequence = self._sequences[self._queue[0]]
        if self._pool.can_reserve(sequence.num_blocks):
            return True
        found = self._pool.find(sequence.reusable())
        return self._pool.can_reserve(sequence.num_blocks - len(found), beside=found)

    @property
    def can_run(self) -> bool:
        return bool(self._prefilling or self._decoding)

    def statistics(self, num_steps: int = 0) -> EngineStatistics:
        stages = [sequence.stage for sequence in self._sequences.values()]
        return EngineStatistics(
            num_queued=len(self._queue),
            num_prefilling=len(self._prefilling),
            num_holding=stages.count(Stage.HOLDING),
            num_waiting_for_state=stages.count(Stage.WAITING_FOR_STATE),
            num_decoding=len(self._decoding),
            num_pages_usable=self._pool.num_usable,
            num_pages_free=self._pool.num_free,
            num_steps=num_steps,
            num_blocks_found=self._num_blocks_found,
            num_blocks_missed=self._num_blocks_missed,
            num_drafts=self._num_drafts,
            num_drafts_accepted=self._num_drafts_accepted,
        )

    def _take_pages(self, sequence: Sequence) -> None:
        """Become a holder of what the cache has of the request, and reserve the rest."""
        names = sequence.reusable()
        found = self._pool.find(names)
        self._pool.share(found)
        sequence.pages = found + self._pool.reserve(sequence.num_blocks - len(found))
        sequence.num_kept = len(found)
        sequence.num_computed = len(found) * self._bounds.block_size
        self._num_blocks_found += len(found)
        self._num_blocks_missed += len(names) - len(found)

    def _keep(self, sequence: Sequence, num_computed: int) -> None:
        """Keep the pages that have become full, the state of so many tokens being computed. A page that was computed
        twice is kept once; its twin is held as long as ours, so that whoever holds a block holds all before it, and is
        let go in the right order."""
        for block, name in sequence.newly_complete(num_computed):
            kept = self._pool.keep(sequence.pages[block], name)
            if kept != sequence.pages[block]:
                self._pool.share([kept])
                sequence.twins[block] = kept
            sequence.num_kept = block + 1

    def _verify(
        self, sequence: Sequence, run: Run, samples: SequenceOf[Sample | None], events: list[EngineEvent]
    ) -> None:
        """Accept tokens up to the first that differs from what was proposed in its place.

        A sample hangs on seed and position alone, so each is the token that decoding one by one would have chosen.
        What the step stored for the proposals behind it lies beyond the computed tokens, and is overwritten.
        """
        drafts = run.tokens[len(run.tokens) - run.num_drafts :]
        self._num_drafts += len(drafts)
        for i, sample in enumerate(samples):
            self._accept(sequence, sample, events)
            if sequence.stage is not Stage.DECODING or i == len(drafts) or sequence.tokens[-1] != drafts[i]:
                break
            self._num_drafts_accepted += 1

    def _accept_if_held(self, sequence: Sequence, sample: Sample | None, events: list[EngineEvent]) -> None:
        """Unless it was released while the step was under way: then its choice is nobody's."""
        if sequence.stage is Stage.RELEASED:
            self._free(sequence)
        else:
            self._accept(sequence, sample, events)

    def _accept(self, sequence: Sequence, sample: Sample | None, events: list[EngineEvent]) -> None:
        """Take a generated token, the state of all before it being computed: tell it, then go on, hold or finish."""
        request_id = sequence.request.id
        if sample is None:
            events.append(self._refuse_damaged(sequence))
            return
        reason = self._take(sequence, sample.token)
        if sequence.stage is not Stage.DECODING and not self._begin_decode(sequence):
            events.append(PrefillFinished(request_id, sample.token, sample.logprob, sample.top))
            return
        events.append(TokenGenerated(request_id, sample.token, sample.logprob, sample.top))
        if reason is not None:
            self.release(request_id)
            events.append(RequestFinished(request_id, reason))

    def _take(self, sequence: Sequence, token: int) -> FinishReason | None:
        """Keep what can be kept, and append a generated token; why it is the last, if it is."""
        self._keep(sequence, len(sequence.tokens))
        return sequence.take(token, self._bounds.eos_tokens)

    def _refuse_damaged(self, sequence: Sequence) -> RequestRefused:
        self.release(sequence.request.id)
        self.empty_cache()  # whatever the damage is, it may lie in pages that others would take
        return RequestRefused(sequence.request.id, NOT_FINITE, never=False)

    def _begin_decode(self, sequence: Sequence) -> bool:
        """Its prompt is computed: whether it goes on, and does not hold its pages for a reader."""
        self._prefilling.pop(sequence.request.id, None)
        if isinstance(sequence.request, PrefillRequest):
            sequence.stage = Stage.HOLDING
            return False
        sequence.stage = Stage.DECODING
        self._decoding[sequence.request.id] = sequence
        self._joining[sequence] = None
        return True

    def _free(self, sequence: Sequence) -> None:
        """Let go of the pages of what was released, unless a step under way computes it: then when that has ended."""
        if not any(step.has(sequence) for step in self._under_way):
            self._pool.free(sequence.held)

    def _check_writable(self, run: Run) -> None:
        size = self._bounds.block_size
        for block in range(run.start // size, (run.start + len(run.tokens) - 1) // size + 1):
            self._check_page(run.pages[block])

    def _check_page(self, page: int) -> None:
        assert self._pool.is_writable(page), f"page {page} is shared, or kept"


def _refusal(request: EngineRequest, max_model_len: int, vocab_size: int) -> tuple[str, "array[int]"]:
    """Why the request can never be served whatever the pool, or the empty string; and its prompt as numbers of four
    bytes."""
    prompt = _packed(vocab_size, request.prompt)
    if prompt is None:
        bad = next(token for token in request.prompt if not 0 <= token < vocab_size)
        return f"prompt token {bad} is outside the vocabulary of {vocab_size}", array("I")
    num_prompt = len(request.prompt)
    num_generated = 1 if isinstance(request, PrefillRequest) else request.max_tokens
    problem = ""
    if num_prompt < 1:
        problem = "the prompt is empty"
    elif num_generated < 1:
        problem = f"max_tokens must be at least 1, not {num_generated}"
    elif num_prompt + num_generated > max_model_len:
        problem = f"{num_prompt} prompt tokens and {num_generated} to generate exceed the context of {max_model_len}"
    return problem, prompt


def _packed(bound: int, tokens: SequenceOf[int]) -> "array[int] | None":
    """None unless all are from 0 to ``bound - 1``. By an array, since steps wait while somebody looks at a long
    prompt."""
    try:
        packed = array("I", tokens)
    except OverflowError:  # negative, or more than such an array holds
        return None
    return packed if np.frombuffer(packed, np.uintc).max(initial=0) < bound else None
