"""OpenAI's chat completions in pdkv's own types: answers and stream events."""

from collections.abc import Sequence

import msgspec

from pdkv.daemons.openai_api import DebugBlock, Usage


class RivalToken(msgspec.Struct, frozen=True):
    """One of the likeliest tokens at a position."""

    token: str
    logprob: float
    """Natural logarithm under the plain softmax, whatever temperature and top_p chose the token."""
    bytes: list[int] | None
    """What it adds to the text in UTF-8; of a token that is part of a character, these bytes. None: not known."""


class ChatToken(msgspec.Struct, frozen=True):
    """A generated token."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[RivalToken]
    """Likeliest first; the token itself only if it is one of them."""


class ChatLogprobs(msgspec.Struct, frozen=True):
    content: list[ChatToken]


class ChatMessage(msgspec.Struct, frozen=True):
    """What the model says. There is no parser of tool calls: if the model writes one, it is in ``content``."""

    content: str
    role: str = "assistant"


class ChatChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: Sequence[ChatChoice]
    usage: Usage
    pdkv: DebugBlock | msgspec.UnsetType = msgspec.UNSET


class ChatDelta(msgspec.Struct, frozen=True):
    """What a chunk adds to a message."""

    role: str | msgspec.UnsetType = msgspec.UNSET
    content: str | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a stream."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: Sequence[ChatChunkChoice]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET
    pdkv: DebugBlock | msgspec.UnsetType = msgspec.UNSET
