"""Reads the body of a completions request: strictly, and refusing by name whatever pdkv would not honour.

A field that pdkv does not implement is accepted only with the value that means "off"; anything else is refused by
name, because an answer that ignores what was asked is a wrong answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pdkv.errors import RequestError
from pdkv.m3.logprobs import MAX_TOP, PromptLogprobs

DEFAULT_MAX_TOKENS = 16
DEFAULT_TEMPERATURE = 1.0
"""Both are OpenAI's: a client that wants greedy decoding says ``temperature: 0``."""
MAX_STOPS = 16
"""OpenAI allows 4, but evaluation tasks send more."""
MAX_STOP_CHARACTERS = 1024
MAX_PROMPT_LOGPROB_BYTES = 6 << 20
"""Of all prompts of a request together, packed: they travel in one message a prompt."""

_OFF: dict[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
    "suffix": ("",),
}
"""Fields of OpenAI's that are not implemented, with the values (besides null) that ask for nothing."""

Prompt = str | list[int]


class CompletionRequest(msgspec.Struct, frozen=True):
    """A completions request whose fields have the right types; what depends on the model is checked later."""

    prompts: list[Prompt]
    """One choice each, in this order."""
    model: str | None = None
    """None: the client named none and takes what is served."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """0, with ``echo`` only: nothing but the prompt."""
    temperature: float = DEFAULT_TEMPERATURE
    seed: int | None = None
    stream: bool = False
    include_usage: bool = False
    ignore_eos: bool = False
    """Extension: go on to ``max_tokens`` whatever the model says."""
    return_token_ids: bool = False
    """Extension: add ``token_ids`` to every choice."""
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    """Likeliest tokens to tell with each token; None: tell nothing, not even of the tokens themselves."""
    echo: bool = False
    user: str = ""
    """Read and not used."""

    @property
    def prompt_logprobs(self) -> int | None:
        """Likeliest tokens to tell with each prompt token; None: the prompt is not scored."""
        return self.logprobs if self.echo else None


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body strictly: a bool is no number, "5" is no 5. Raises RequestError that names the field."""
    values: dict[str, Any] = {}
    for name, raw in read_fields(body).items():
        if is_null(raw) and name != "prompt":
            continue
        if name in _OFF:
            _refuse_unless_off(name, raw)
        elif name == "prompt":
            values["prompts"] = _prompts(raw)
        elif name == "stream_options":
            values["include_usage"] = _include_usage(raw)
        elif name in _FIELDS:
            values[name] = _FIELDS[name](name, raw)
        else:
            raise RequestError(f"unknown field {name!r}", param=name, code="unknown_parameter")
    if "prompts" not in values:
        raise RequestError("the field 'prompt' is missing: text or a list of token ids", param="prompt")
    if "include_usage" in values and not values.get("stream"):
        raise RequestError("'stream_options' is only allowed together with 'stream': true", param="stream_options")
    request = CompletionRequest(**values)
    if request.max_tokens == 0 and not request.echo:
        raise RequestError("'max_tokens' 0 asks for nothing; it is allowed with 'echo': true only", param="max_tokens")
    return request


def read_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, unread. Raises RequestError for anything else."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise RequestError("the body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from None


def check_model(model: str | None, served: Sequence[str]) -> None:
    """Raise the 404 of an unknown model. ``served``: the name, and other spellings that are accepted."""
    if model is not None and model not in served:
        raise RequestError(
            f"the model {model!r} is not served here; {served[0]!r} is",
            param="model",
            code="model_not_found",
            status=404,
        )


def check_num_prompts(request: CompletionRequest, most: int) -> None:
    """Raise RequestError for a list of prompts that is too long."""
    if len(request.prompts) > most:
        raise RequestError(
            f"'prompt' holds {len(request.prompts)} prompts; at most {most} are served in one request", param="prompt"
        )


def check_token_ids(token_ids: Sequence[int], vocab_size: int, param: str = "prompt") -> None:
    """Raise RequestError when a prompt is empty or holds an id that the model has no embedding for."""
    if not token_ids:
        raise RequestError(f"{param!r} is empty; at least one token is needed", param=param)
    if min(token_ids) >= 0 and max(token_ids) < vocab_size:
        return
    position = next(i for i, token in enumerate(token_ids) if not 0 <= token < vocab_size)
    raise RequestError(
        f"{param!r} holds the token id {token_ids[position]} at position {position}; "
        f"this model's ids are 0 to {vocab_size - 1}",
        param=param,
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


def check_prompt_logprobs(request: CompletionRequest, num_prompt_tokens: int) -> None:
    """Raise RequestError when the prompts (``num_prompt_tokens`` in all) are too long to be scored in one request."""
    if request.prompt_logprobs is None:
        return
    longest = MAX_PROMPT_LOGPROB_BYTES // PromptLogprobs.num_bytes(1, request.prompt_logprobs)
    if num_prompt_tokens > longest:
        raise RequestError(
            f"'echo' with 'logprobs' {request.prompt_logprobs} is served for up to {longest} prompt tokens a request, "
            f"all prompts together; these are {num_prompt_tokens}: send fewer, or ask for fewer 'logprobs'",
            param="logprobs",
        )


def _start(raw: msgspec.Raw, size: int) -> bytes:
    return bytes(memoryview(raw)[:size])


def is_null(raw: msgspec.Raw) -> bool:
    return _start(raw, 5) == b"null"


def _decode(name: str, raw: msgspec.Raw, kind: Any, meaning: str) -> Any:
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = _start(raw, 40).decode("utf-8", "replace")
        raise RequestError(f"{name!r} must be {meaning}, found {found}", param=name) from None


def read_as(kind: Any, meaning: str) -> Callable[[str, msgspec.Raw], Any]:
    """A reader of fields of one type; ``meaning`` completes "must be"."""
    return lambda name, raw: _decode(name, raw, kind, meaning)


def _number(low: float, high: float, kind: Any, meaning: str) -> Callable[[str, msgspec.Raw], Any]:
    def read(name: str, raw: msgspec.Raw) -> Any:
        value = _decode(name, raw, kind, meaning)
        if not low <= value <= high:
            raise RequestError(f"{name!r} must be {meaning}, found {value}", param=name)
        return value

    return read


def _prompts(raw: msgspec.Raw) -> list[Prompt]:
    """Text, token ids, or a list of either; the first item says which."""
    first = _start(raw, 64).lstrip()[:1]
    if first == b'"':
        return [_decode("prompt", raw, str, "valid text")]
    if first != b"[":
        raise RequestError("'prompt' must be text, a list of token ids, or a list of these", param="prompt")
    rest = _start(raw, 256).lstrip()[1:].lstrip()[:1]
    if rest == b'"':
        return list(_decode("prompt", raw, list[str], "text, or a list of nothing but texts"))
    if rest == b"[":
        return list(_decode("prompt", raw, list[list[int]], "a list of nothing but lists of token ids"))
    return [_decode("prompt", raw, list[int], "text or a list of whole numbers (token ids)")]


def _stop(name: str, raw: msgspec.Raw) -> tuple[str, ...]:
    value = _decode(name, raw, str | list[str], "text or a list of texts")
    stops = [value] if isinstance(value, str) else value
    if isinstance(value, str) and not value:
        return ()
    if len(stops) > MAX_STOPS:
        raise RequestError(f"'stop' holds {len(stops)} texts; at most {MAX_STOPS} are served", param=name)
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"each text of 'stop' must have 1 to {MAX_STOP_CHARACTERS} characters", param=name)
    return tuple(stops)


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
        only = msgspec.json.encode(_OFF[name][0]).decode()
        raise RequestError(
            f"{name!r} is not supported; leave it out or set it to {only}", param=name, code="unsupported_parameter"
        )


_INT64 = 2**63 - 1
_FIELDS: Mapping[str, Callable[[str, msgspec.Raw], Any]] = {
    "model": read_as(str, "a model's name"),
    "max_tokens": _number(0, _INT64, int, "a whole number of at least 1, or 0 with 'echo'"),
    "temperature": _number(0.0, 2.0, float, "a number from 0 (greedy) to 2"),
    "top_p": _number(0.0, 1.0, float, "a number from 0 to 1"),
    "seed": _number(-_INT64, _INT64, int, "a whole number of 64 bits"),
    "stop": _stop,
    "logprobs": _number(0, MAX_TOP, int, f"a whole number from 0 to {MAX_TOP}"),
    "echo": read_as(bool, "true or false"),
    "stream": read_as(bool, "true or false"),
    "ignore_eos": read_as(bool, "true or false"),
    "return_token_ids": read_as(bool, "true or false"),
    "user": read_as(str, "text"),
}
