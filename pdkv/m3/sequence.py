"""One request that the scheduler holds: its tokens, its pages, how far it has got."""

from array import array
from enum import Enum

import numpy as np

from pdkv.m3.prefix_cache import BlockNames
from pdkv.m3.requests import DecodeRequest, EngineRequest, FinishReason, PrefillRequest
from pdkv.m3.run import Run
from pdkv.m3.sampling import Tokens
from pdkv.m3.speculation import PromptLookup


class Stage(Enum):
    QUEUED = "queued"
    PREFILLING = "prefilling"
    HOLDING = "holding"
    WAITING_FOR_STATE = "waiting_for_state"
    DECODING = "decoding"
    RELEASED = "released"
    """Forgotten by its id; its pages are let go when no step is under way that computes it."""


class Told:
    """What the latest steps of a group chose, one after the other. Owned by the group, and read by its sequences, each
    of which takes its own before it is written over: when it begins a block, at the latest."""

    def __init__(self, size: int, most: int) -> None:
        """``size``: steps that are kept; ``most``: places of any."""
        self._tokens = np.zeros((size, most), dtype=np.uint32)
        self.num_steps = 0

    def add(self, tokens: Tokens) -> None:
        """By place: int64 [places]."""
        self._tokens[self.num_steps % len(self._tokens), : len(tokens)] = tokens
        self.num_steps += 1

    def of(self, place: int, begin: int, end: int) -> bytes:
        """What that place chose in these steps, as native unsigned integers of four bytes."""
        size = len(self._tokens)
        assert self.num_steps - begin <= size, "steps were forgotten before a sequence took their tokens"
        first, last = begin % size, end % size
        if first < last:
            return self._tokens[first:last, place].tobytes()
        return self._tokens[first:, place].tobytes() + self._tokens[:last, place].tobytes()


class Sequence:
    """One request that is not over. Owned by the scheduler."""

    def __init__(self, request: EngineRequest, prompt: "array[int]", names: BlockNames | None, block_size: int) -> None:
        """``prompt``: the request's, as unsigned integers of four bytes; owned by the sequence from here on."""
        self.request = request
        self.stage = Stage.QUEUED
        self.pages: tuple[int, ...] = ()
        """In block order, for all that the request may ever need."""
        self.twins: dict[int, int] = {}
        """By block: the page that another request computed first, and that is kept instead of ours."""
        self.num_computed = 0
        """Leading tokens of the prompt whose state is in the pages. Of what follows it, that is all but the last."""
        self.num_kept = 0
        """Leading blocks whose pages are kept in the prefix cache."""
        self.most_tokens = len(request.prompt) + (1 if isinstance(request, PrefillRequest) else request.max_tokens)
        """It ends, at the latest, with so many."""
        self.ignores_eos = isinstance(request, PrefillRequest) or request.ignore_eos
        self.place = 0
        """In the latest step of its group."""
        self._place_before, self._moved_at = 0, 0
        """Its place in steps before that one."""
        self._tokens = prompt
        self._told: Told | None = None
        """Of its group's steps. From ``_num_taken`` on it is not in ``_tokens`` yet."""
        self._num_taken = 0
        self._run_pages: tuple[int, ...] = ()
        self._names = names
        self._lookup = PromptLookup()
        self._block_size = block_size

    @property
    def tokens(self) -> "array[int]":
        """The prompt, then what was generated. Whoever adds to it has asked for it."""
        told = self._told
        if told is not None and told.num_steps > self._num_taken:
            begin, end = self._num_taken, told.num_steps
            if begin < self._moved_at:
                moved_at = min(self._moved_at, end)
                self._tokens.frombytes(told.of(self._place_before, begin, moved_at))
                begin = moved_at
            if begin < end:
                self._tokens.frombytes(told.of(self.place, begin, end))
            self._num_taken = end
        return self._tokens

    def follow(self, told: Told, place: int, step: int) -> None:
        """From that step on its tokens are those at ``place`` of what is told."""
        self._tokens = self.tokens
        self._told, self._num_taken = told, step
        self.place, self._place_before, self._moved_at = place, place, step

    def move(self, place: int, step: int) -> None:
        """From that step on it has another place; of steps before, at most one has not ended."""
        self._tokens = self.tokens
        self._place_before, self.place, self._moved_at = self.place, place, step

    def stop_following(self) -> None:
        """It has ended: nothing more that is told is its own."""
        self._told = None

    def place_in(self, step: int) -> int:
        """In that step of its group, which has not ended."""
        return self.place if step >= self._moved_at else self._place_before

    @property
    def num_prompt_left(self) -> int:
        """Prompt tokens that are still to be computed."""
        return len(self.request.prompt) - self.num_computed

    @property
    def num_blocks(self) -> int:
        """Blocks of all that the request may ever hold."""
        request = self.request
        num_tokens = len(request.prompt) + (0 if isinstance(request, PrefillRequest) else request.max_tokens)
        return -(-num_tokens // self._block_size)

    @property
    def held(self) -> list[int]:
        """Every page of which the request is a holder, in block order."""
        held = list(self.pages)
        for block in sorted(self.twins, reverse=True):
            held.insert(block + 1, self.twins[block])
        return held

    def reusable(self) -> list[bytes]:
        """Names of the leading blocks whose state it would take from the cache.

        The last prompt token is always computed, and so is all of a prompt that is to be scored: that needs the
        model's output for every token, not only the state it leaves.
        """
        request = self.request
        if self._names is None or (not isinstance(request, DecodeRequest) and request.prompt_top is not None):
            return []
        return self._names.first((len(request.prompt) - 1) // self._block_size, self.tokens)

    def newly_complete(self, num_computed: int) -> list[tuple[int, bytes]]:
        """Blocks whose pages are not kept yet, with their names, when the state of so many tokens has been computed."""
        num_complete = num_computed // self._block_size
        if self._names is None or num_complete <= self.num_kept:
            return []
        return list(enumerate(self._names.first(num_complete, self.tokens, self.num_kept), self.num_kept))

    def keep_nothing(self) -> None:
        """From now on it neither takes pages from the cache nor gives any."""
        self._names = None

    def prompt_run(self, budget: int) -> Run:
        """Up to ``budget`` tokens of the prompt that are not computed yet."""
        request, start = self.request, self.num_computed
        assert not isinstance(request, DecodeRequest), "a decode's prompt is computed elsewhere"
        tokens = request.prompt[start : start + budget]
        end = start + len(tokens)
        scores = request.prompt_top is not None
        is_last = end == len(request.prompt)
        return Run(
            id=request.id,
            tokens=tokens,
            start=start,
            pages=self._pages_up_to(end),
            sampling=request.sampling if is_last else None,
            num_top=request.num_top if is_last else 0,
            targets=request.prompt[start + 1 : end + 1] if scores else (),
            prompt_top=request.prompt_top or 0,
        )

    def decode_run(self, most_drafts: int, *, tells_all_pages: bool) -> Run:
        """The last generated token, and what may follow it: never more than may still be generated.

        ``tells_all_pages``: those too that it will come to, so that runs behind need not tell of any.
        """
        request, known = self.request, self.tokens
        start, room = len(known) - 1, self.most_tokens - len(known) - 1
        drafts = self._lookup.propose(known, min(most_drafts, room)) if most_drafts else ()
        return Run(
            id=request.id,
            tokens=(known[-1], *drafts),
            start=start,
            pages=self.pages if tells_all_pages else self._pages_up_to(start + 1 + len(drafts)),
            sampling=request.sampling,
            num_drafts=len(drafts),
            num_top=request.num_top,
        )

    def take(self, token: int, eos_tokens: frozenset[int]) -> FinishReason | None:
        """Append a generated token; why it is the last, if it is."""
        self.tokens.append(token)
        if token in eos_tokens and not self.ignores_eos:
            return FinishReason.STOP
        return FinishReason.LENGTH if len(self.tokens) >= self.most_tokens else None

    def _pages_up_to(self, end: int) -> tuple[int, ...]:
        """Pages of the blocks before ``end``. The same object while there is no new one: whoever compares sees that."""
        num_blocks = -(-end // self._block_size)
        if len(self._run_pages) != num_blocks:
            self._run_pages = self.pages[:num_blocks]
        return self._run_pages
