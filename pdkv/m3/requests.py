"""What goes into the engine and what comes out of it: requests, events and settings, values only."""

from collections.abc import Iterable, Iterator, Sequence
from enum import StrEnum
from itertools import repeat
from typing import NewType

import msgspec

from pdkv.m3.logprobs import NO_TOP, PromptLogprobs, TopLogprobs, Tops
from pdkv.m3.sampling import NO_TOKEN, Logprobs, SamplingParams, Tokens

RequestId = NewType("RequestId", bytes)
"""Chosen by the caller, unique among the requests that the engine holds."""


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Bounds of one engine. ``max_model_len`` counts prompt and generated tokens together."""

    max_model_len: int
    prefill_chunk: int = 512
    """Prompt tokens computed in one step, over all requests."""
    max_batch: int = 64
    """Decodes computed in one step."""
    max_queued: int = 4096
    """Requests that may wait for pages; one more is refused for now."""
    prefix_seed: bytes | None = None
    """What names of cached pages hang on besides tokens (``prefix_cache.seed_of``). None: nothing is cached."""
    speculative_tokens: int = 0
    """Most tokens that are proposed by prompt lookup and verified in one step; 0: decode one by one."""
    batch_invariant: bool = False
    """What is computed of a request hangs on nothing but the request: a step is of one prompt or of decodes, and decode
    steps have one shape. Bit for bit where products do not hang on a row's place, as on a GPU."""
    overlap: bool = True
    """Launch a step that only decodes before the last one's tokens are known here, where runner and requests allow."""

    def __post_init__(self) -> None:
        for name in ("max_model_len", "prefill_chunk", "max_batch", "max_queued"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.batch_invariant and (self.speculative_tokens or self.prefix_seed is not None):
            raise ValueError("batch-invariant steps have no proposals and take nothing from a cache")
        if self.speculative_tokens < 0:
            raise ValueError(f"speculative_tokens cannot be negative, as {self.speculative_tokens} is")


class PrefillRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Compute the prompt and choose the first token; the pages stay until ``release``."""

    id: RequestId
    prompt: tuple[int, ...]
    sampling: SamplingParams
    num_top: int = 0
    """Likeliest tokens to tell with each generated one."""
    prompt_top: int | None = None
    """Tell the log-probability of every prompt token but the first, with these many likeliest; None: tell nothing."""


class DecodeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Hold pages for a prompt computed elsewhere; starts when ``resume`` says that its state is resident.

    The prompt's tokens say which of its pages are here already, and what may be proposed.
    """

    id: RequestId
    prompt: Sequence[int]
    """Not to be changed; an array takes least."""
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    num_top: int = 0


class CompleteRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill and decode in this engine, undivided."""

    id: RequestId
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: SamplingParams
    ignore_eos: bool = False
    num_top: int = 0
    prompt_top: int | None = None


EngineRequest = PrefillRequest | DecodeRequest | CompleteRequest


class FinishReason(StrEnum):
    STOP = "stop"
    """The last token is an end-of-sequence token."""
    LENGTH = "length"
    """``max_tokens`` tokens were generated."""


class PagesReserved(msgspec.Struct, frozen=True):
    """The request left the queue; ``pages`` in block order hold its whole need.

    The state of the first ``cached_tokens`` prompt tokens, which fill their pages, is there already. Others may read
    those pages too; nobody may write to them.
    """

    id: RequestId
    pages: tuple[int, ...]
    cached_tokens: int = 0


class PrefillProgress(msgspec.Struct, frozen=True):
    """K/V and index keys of the first ``tokens_done`` prompt tokens are in the cache, kernels finished. Monotone."""

    id: RequestId
    tokens_done: int


class PromptScored(msgspec.Struct, frozen=True):
    """Log-probabilities of the next prompt tokens in order; told for each chunk, before the first generated token."""

    id: RequestId
    logprobs: PromptLogprobs


class PrefillFinished(msgspec.Struct, frozen=True):
    """The prompt of a ``PrefillRequest`` is computed; ``token`` is the first generated one, ``logprob`` natural."""

    id: RequestId
    token: int
    logprob: float
    top: TopLogprobs = NO_TOP


class TokenGenerated(msgspec.Struct, frozen=True, gc=False):
    """One generated token of a ``DecodeRequest`` or ``CompleteRequest``, the first included."""

    id: RequestId
    token: int
    logprob: float
    top: TopLogprobs = NO_TOP


class RequestFinished(msgspec.Struct, frozen=True):
    """The end of a ``DecodeRequest`` or ``CompleteRequest``; its pages are free, or once the step in flight ends."""

    id: RequestId
    reason: FinishReason


class RequestRefused(msgspec.Struct, frozen=True):
    """The engine holds nothing of the request (any more). ``never``: asking the same again is pointless, for what it
    asks; else the cause is here: no room in the queue, or damaged state."""

    id: RequestId
    message: str
    never: bool


class TokensGenerated(msgspec.Struct, frozen=True, gc=False):
    """``TokenGenerated`` of several requests, entry by entry: what one step chose for all that go on, and no object for
    each."""

    ids: list[RequestId]
    """The same list as with the last such event, while they are the same in the same places. Not to be changed."""
    tokens: Tokens  # int64 [num_ids]; NO_TOKEN where nothing is told of the request
    logprobs: Logprobs  # float64 [num_ids]
    tops: Tops | None = None
    """Of ``num_ids`` entries, where any is asked for."""


RequestEvent = (
    PagesReserved | PrefillProgress | PromptScored | PrefillFinished | TokenGenerated | RequestFinished | RequestRefused
)
EngineEvent = RequestEvent | TokensGenerated


def singly(events: Iterable[EngineEvent]) -> Iterator[RequestEvent]:
    """In the same order, each of one request."""
    for event in events:
        if isinstance(event, TokensGenerated):
            tops = repeat(NO_TOP) if event.tops is None else event.tops.each()
            told = map(TokenGenerated, event.ids, event.tokens.tolist(), event.logprobs.tolist(), tops)
            yield from (one for one in told if one.token != NO_TOKEN)
        else:
            yield event


class EngineStatistics(msgspec.Struct, frozen=True):
    """Requests by stage, and pages."""

    num_queued: int
    num_prefilling: int
    num_holding: int
    """Prefilled, pages kept for a reader until release."""
    num_waiting_for_state: int
    num_decoding: int
    """Including those beyond ``max_batch`` that wait for a slot."""
    num_pages_usable: int
    num_pages_free: int
    """Including those that are only kept in the prefix cache."""
    num_steps: int
    num_blocks_found: int = 0
    """Of admitted prompts, blocks that could have been in the prefix cache and were, since the start."""
    num_blocks_missed: int = 0
    num_drafts: int = 0
    """Tokens that were proposed and verified, since the start."""
    num_drafts_accepted: int = 0
