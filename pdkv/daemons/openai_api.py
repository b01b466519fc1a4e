"""OpenAI's completions API in pdkv's own types: a body in, answers, stream events and errors out.

A field that pdkv does not implement is accepted only with the value that means "off"; anything else is refused by
name, because an answer that ignores what was asked is a wrong answer.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pdkv.daemons.link import TransferReport
from pdkv.errors import RequestError

MAX_BODY_BYTES = 32 << 20

DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
"""Both are OpenAI's: a client that wants greedy decoding says ``temperature: 0``."""

_OFF: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "logprobs": (),
    "stop": ([], ""),
    "suffix": ("",),
    "top_p": (1, 1.0),
}
"""Fields of OpenAI's that are not implemented, with the values (besides null) that ask for nothing."""

_WITHOUT_EFFECT = ("user",)
"""Fields that change no answer."""


class CompletionRequest(msgspec.Struct, frozen=True):
    """A completions request whose fields have the right types; what depends on the model is checked later."""

    prompt: str | list[int]
    model: str | None = None
    """None: the client named none and takes what is served."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    temperature: float = DEFAULT_TEMPERATURE
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False
    """Extension: go on to ``max_tokens`` whatever the model says."""
    return_token_ids: bool = False
    """Extension: add ``token_ids`` to every choice."""


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int

    @classmethod
    def of(cls, prompt_tokens: int, completion_tokens: int) -> "Usage":
        return cls(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


class Choice(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    index: int = 0
    logprobs: None = None
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


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body strictly: a bool is no number, "5" is no 5. Raises RequestError that names the field."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise RequestError("the body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from None
    values: dict[str, Any] = {}
    for name, raw in fields.items():
        if _start(raw, 5) == b"null" and name != "prompt":
            continue
        if name in _OFF:
            _refuse_unless_off(name, raw)
        elif name == "stream_options":
            values["include_usage"] = _include_usage(raw)
        elif name in _FIELDS:
            values[name] = _FIELDS[name](name, raw)
        elif name not in _WITHOUT_EFFECT:
            raise RequestError(f"unknown field {name!r}", param=name, code="unknown_parameter")
    if "prompt" not in values:
        raise RequestError("the field 'prompt' is missing: text or a list of token ids", param="prompt")
    if "include_usage" in values and not values.get("stream"):
        raise RequestError("'stream_options' is only allowed together with 'stream': true", param="stream_options")
    return CompletionRequest(**values)


def check_model(request: CompletionRequest, served: Sequence[str]) -> None:
    """Raise the 404 of an unknown model. ``served``: the name, and other spellings that are accepted."""
    if request.model is not None and request.model not in served:
        raise RequestError(
            f"the model {request.model!r} is not served here; {served[0]!r} is",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise RequestError when a prompt is empty or holds an id that the model has no embedding for."""
    if not token_ids:
        raise RequestError("'prompt' is empty; at least one token is needed", param="prompt")
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    position = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    raise RequestError(
        f"'prompt' holds the token id {token_ids[position]} at position {position}; "
        f"this model's ids are 0 to {vocab_size - 1}",
        param="prompt",
    )


def check_length(num_prompt_tokens: int, max_tokens: int, max_model_len: int) -> None:
    """Raise RequestError when prompt and answer together exceed the context."""
    if num_prompt_tokens + max_tokens > max_model_len:
        raise RequestError(
            f"the context is {max_model_len} tokens; the prompt has {num_prompt_tokens} and 'max_tokens' asks for "
            f"{max_tokens} more, {num_prompt_tokens + max_tokens} in all",
            param="prompt" if num_prompt_tokens >= max_model_len else "max_tokens",
            code="context_length_exceeded",
        )


def encode_event(event: Completion | ErrorBody) -> bytes:
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


def _start(raw: msgspec.Raw, size: int) -> bytes:
    return bytes(memoryview(raw)[:size])


def _decode(name: str, raw: msgspec.Raw, kind: Any, meaning: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = _start(raw, 40).decode("utf-8", "replace")
        raise RequestError(f"{name!r} must be {meaning}, found {found}", param=name) from None


def _field(kind: Any, meaning: str) -> Callable[[str, msgspec.Raw], Any]:
    return lambda name, raw: _decode(name, raw, kind, meaning)


def _number(low: float, high: float, kind: Any, meaning: str) -> Callable[[str, msgspec.Raw], Any]:
    def read(name: str, raw: msgspec.Raw) -> Any:
        value = _decode(name, raw, kind, meaning)
        if not low <= value <= high:
            raise RequestError(f"{name!r} must be {meaning}, found {value}", param=name)
        return value

    return read


def _prompt(name: str, raw: msgspec.Raw) -> str | list[int]:
    first = _start(raw, 64).lstrip()[:1]
    if first == b'"':
        text: str = _decode(name, raw, str, "valid text")
        return text
    if first != b"[":
        raise RequestError("'prompt' must be text or a list of token ids", param=name)
    rest = _start(raw, 256).lstrip()[1:].lstrip()[:1]
    if rest in (b'"', b"["):
        raise RequestError(
            "'prompt' is a list of prompts; send one prompt a request, as text or a list of token ids", param=name
        )
    token_ids: list[int] = _decode(name, raw, list[int], "text or a list of whole numbers (token ids)")
    return token_ids


def _include_usage(raw: msgspec.Raw) -> bool:
    options = _decode("stream_options", raw, dict[str, Any], "an object")
    for key, value in options.items():
        if key == "include_usage" and isinstance(value, bool | None):
            continue
        if key == "include_obfuscation" and value in (None, False):
            continue
        raise RequestError(f"'stream_options.{key}' is not supported with this value", param="stream_options")
    return bool(options.get("include_usage"))


def _refuse_unless_off(name: str, raw: msgspec.Raw) -> None:
    value = _decode(name, raw, Any, "valid JSON")
    if not any(value == off and type(value) is type(off) for off in _OFF[name]):
        raise RequestError(f"{name!r} is not supported{_only(_OFF[name])}", param=name, code="unsupported_parameter")


def _only(off: tuple[object, ...]) -> str:
    return f"; leave it out or set it to {msgspec.json.encode(off[0]).decode()}" if off else "; leave it out"


_INT64 = 2**63 - 1
_FIELDS: Mapping[str, Callable[[str, msgspec.Raw], Any]] = {
    "model": _field(str, "a model's name"),
    "prompt": _prompt,
    "max_tokens": _number(1, _INT64, int, "a whole number of at least 1"),
    "temperature": _number(0.0, 2.0, float, "a number from 0 (greedy) to 2"),
    "seed": _number(-_INT64, _INT64, int, "a whole number of 64 bits"),
    "stream": _field(bool, "true or false"),
    "ignore_eos": _field(bool, "true or false"),
    "return_token_ids": _field(bool, "true or false"),
}
