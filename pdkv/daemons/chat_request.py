"""Reads the body of a chat completions request."""

from typing import Any

import msgspec

from pdkv.daemons.conversation import CONVERSATION, Conversation
from pdkv.daemons.generation import Options
from pdkv.daemons.request_fields import (
    COMMON,
    COMMON_OFF,
    Off,
    Readers,
    count,
    decode,
    number,
    read_as,
    read_fields,
    read_values,
)
from pdkv.errors import RequestError
from pdkv.m3.logprobs import MAX_TOP


class ChatRequest(msgspec.Struct, frozen=True):
    """A chat request whose fields have the right types; what depends on the model is checked later."""

    conversation: Conversation
    max_tokens: int | None = None
    """None: whatever the context leaves."""
    options: Options = Options()


def parse_chat(body: bytes) -> ChatRequest:
    """Read a request body as strictly as ``parse_completion`` does. Raises RequestError that names the field."""
    values = read_values(read_fields(body), _FIELDS, _OFF)
    most, newer = values.get("max_tokens"), values.get("max_completion_tokens")
    if most is not None and newer is not None and most != newer:
        told = f"'max_tokens' {most} and 'max_completion_tokens' {newer} contradict each other; send one of them"
        raise RequestError(told, param="max_completion_tokens")
    wanted, top = values.pop("logprobs", False), values.pop("top_logprobs", None)
    if top is not None and not wanted:
        raise RequestError("'top_logprobs' is only allowed together with 'logprobs': true", param="top_logprobs")
    if wanted:
        values["logprobs"] = top or 0
    return ChatRequest(Conversation.of(values), most if most is not None else newer, Options.of(values))


def _tool_choice(name: str, raw: msgspec.Raw) -> str:
    value: Any = decode(name, raw, Any, "valid JSON")
    if value not in ("none", "auto"):
        raise RequestError(
            '\'tool_choice\' must be "none" or "auto": there is no parser of tool calls yet, so none can be required; '
            "'tools' are shown to the model, and a call that it writes stands in 'content'",
            param=name,
            code="unsupported_parameter",
        )
    return str(value)


def _response_format(name: str, raw: msgspec.Raw) -> Any:
    value: Any = decode(name, raw, Any, "valid JSON")
    if value != {"type": "text"}:
        told = '\'response_format\' is not supported; leave it out or set it to {"type": "text"}'
        raise RequestError(told, param=name, code="unsupported_parameter")
    return value


_FIELDS: Readers = {
    **COMMON,
    **CONVERSATION,
    "max_tokens": count(1, "a whole number of at least 1"),
    "max_completion_tokens": count(1, "a whole number of at least 1"),
    "logprobs": read_as(bool, "true or false"),
    "top_logprobs": number(0, MAX_TOP, int, f"a whole number from 0 to {MAX_TOP}"),
    "tool_choice": _tool_choice,
    "parallel_tool_calls": read_as(bool, "true or false"),
    "response_format": _response_format,
}
_OFF: Off = {
    **COMMON_OFF,
    "functions": ([],),
    "function_call": ("none",),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "store": (False,),
    "chat_template": (),
}
