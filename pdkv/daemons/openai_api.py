"""OpenAI's completions API in pdkv's own types: answers, stream events, errors, the list of models."""

import time
from collections.abc import Mapping, Sequence

import msgspec

from pdkv.daemons.link import TransferReport
from pdkv.errors import RequestError

MAX_BODY_BYTES = 32 << 20


class PromptTokensDetails(msgspec.Struct, frozen=True):
    cached_tokens: int
    """Prompt tokens that the prefill worker did not have to compute."""


class Usage(msgspec.Struct, frozen=True):
    """Of all choices together; a prompt with several choices counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int, cached_tokens: int = 0) -> "Usage":
        details = PromptTokensDetails(cached_tokens)
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, details)


class Logprobs(msgspec.Struct, frozen=True):
    """OpenAI's legacy form: lists of equal length, one entry a token. A prompt's first token has null in two."""

    text_offset: list[int]
    """Where in the choice's text each token begins, in characters; in a stream counted from its first chunk."""
    token_logprobs: list[float | None]
    """Natural logarithms under the plain softmax, whatever temperature and top_p chose the token."""
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]
    """The likeliest tokens, and the token itself if it is none of them."""


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    index: int = 0
    logprobs: Logprobs | None = None
    finish_reason: str | None
    token_ids: Sequence[int] | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """A whole answer, or one chunk of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: Sequence[Choice]
    usage: Usage | None | msgspec.UnsetType = msgspec.UNSET
    pdkv: "DebugBlock | msgspec.UnsetType" = msgspec.UNSET


class DebugBlock(msgspec.Struct, frozen=True):
    """What the header ``X-Pdkv-Debug: 1`` adds to the answer, in a stream to its last chunk with a choice."""

    request_id: str
    transfer_id: str
    prefill_control: str
    transfer: TransferReport | None
    """Of the only prompt, or of the first."""
    transfers: list[TransferReport | None] | msgspec.UnsetType = msgspec.UNSET
    """Of a list of prompts: one each, in order."""


class ErrorBody(msgspec.Struct, frozen=True):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class _ErrorForm(msgspec.Struct, frozen=True):
    error: ErrorBody


class ApiError(Exception):
    """An answer other than 200, in OpenAI's form. ``retry_after_s`` becomes the header of that name."""

    def __init__(self, status: int, body: ErrorBody, retry_after_s: int | None = None) -> None:
        super().__init__(body.message)
        self.status = status
        self.body = body
        self.retry_after_s = retry_after_s

    @classmethod
    def of(
        cls,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: int | None = None,
    ) -> "ApiError":
        """An error whose ``type`` follows from the status, as OpenAI's do."""
        return cls(status, ErrorBody(message, error_type(status), param, code), retry_after_s)

    @classmethod
    def from_request_error(cls, exc: RequestError) -> "ApiError":
        return cls.of(exc.status, str(exc), code=exc.code, param=exc.param)

    @classmethod
    def decode(cls, status: int, body: bytes, retry_after: str | None) -> "ApiError":
        """The error that a worker answered with, or a stand-in for a body that is none."""
        retry_after_s = int(retry_after) if retry_after and retry_after.isdecimal() else None
        try:
            return cls(status, msgspec.json.decode(body, type=_ErrorForm).error, retry_after_s)
        except msgspec.MsgspecError:
            return cls.of(502, f"a worker answered with status {status} and no explanation", code="internal")

    def encode(self) -> bytes:
        return msgspec.json.encode({"error": self.body})


def error_type(status: int) -> str:
    """OpenAI's ``error.type`` for a status."""
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


def encode_event(event: msgspec.Struct) -> bytes:
    """One server-sent event: a chunk, or the error that ends a stream early."""
    return b"data: " + msgspec.json.encode({"error": event} if isinstance(event, ErrorBody) else event) + b"\n\n"


END_OF_STREAM = b"data: [DONE]\n\n"


def encode_models(models: Mapping[str, int]) -> bytes:
    """The body of ``GET /v1/models``; ``models`` maps a name to its longest context in tokens."""
    created = int(time.time())
    data = [
        {"id": name, "object": "model", "created": created, "owned_by": "pdkv", "max_model_len": longest}
        for name, longest in models.items()
    ]
    return msgspec.json.encode({"object": "list", "data": data})
