"""What a chat template is given: messages, tools and options, read strictly from a request's fields."""

from collections.abc import Mapping
from typing import Any

import msgspec

from pdkv.daemons.request_fields import Readers, decode, read_as
from pdkv.errors import RequestError

Json = dict[str, Any]
"""An object of the client's that only the template looks into."""

_ROLES = ("system", "developer", "user", "assistant", "tool")
_OURS = {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "strftime_now"}


class Conversation(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt before the template has made text of it."""

    messages: list[Json]
    """At least one; ``content`` is text, or may be absent beside ``tool_calls``. Other keys as the client sent them."""
    tools: list[Json] | None = None
    documents: list[Json] | None = None
    template_kwargs: Json = {}
    """Variables of the template besides these."""
    add_generation_prompt: bool = True
    """The text ends where the model's message begins."""
    continue_final_message: bool = False
    """The text ends where the last message ends, and the model goes on with it."""
    add_special_tokens: bool = False
    """The tokenizer adds its own tokens to the text; templates write what is needed themselves."""

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Conversation":
        """From the fields that were read by ``CONVERSATION``, whatever else is among them. Raises RequestError."""
        if "messages" not in values:
            raise RequestError("the field 'messages' is missing: a list of messages", param="messages")
        named = {name: values[name] for name in cls.__struct_fields__ if name in values}
        named["template_kwargs"] = values.get("chat_template_kwargs", {})
        if named.get("continue_final_message"):
            if named.setdefault("add_generation_prompt", False):
                told = "'continue_final_message' and 'add_generation_prompt' are opposites: ask for one of them"
                raise RequestError(told, param="continue_final_message")
            if not isinstance(named["messages"][-1].get("content"), str):
                told = "'continue_final_message' needs a last message with text"
                raise RequestError(told, param="continue_final_message")
        return cls(**named)

    def marked(self, mark: str) -> list[Json]:
        """The messages with ``mark`` at the end of the last one's text."""
        *before, last = self.messages
        return [*before, {**last, "content": last["content"] + mark}]


def _messages(name: str, raw: msgspec.Raw) -> list[Json]:
    messages = decode(name, raw, list[Json], "a list of messages, each an object")
    if not messages:
        raise RequestError("'messages' is empty; at least one message is needed", param=name)
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def _message(message: Json, where: str) -> Json:
    role = message.get("role")
    if role not in _ROLES:
        raise _wrong(f"'{where}.role' must be one of {', '.join(_ROLES)}, found {role!r}")
    read = dict(message)
    calls = message.get("tool_calls")
    if calls is not None:
        if not isinstance(calls, list):
            raise _wrong(f"'{where}.tool_calls' must be a list of calls")
        read["tool_calls"] = [_tool_call(call, f"{where}.tool_calls[{i}]") for i, call in enumerate(calls)]
    content = message.get("content")
    if isinstance(content, list):
        read["content"] = "\n".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(content))
    elif content is None and not (role == "assistant" and calls):
        raise _wrong(f"'{where}.content' is missing; only an assistant's message with 'tool_calls' may have none")
    elif not isinstance(content, str | None):
        raise _wrong(f"'{where}.content' must be text or a list of text parts")
    return read


def _part(part: object, where: str) -> str:
    """The text of ``{"type": "text", "text": TEXT}``."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise _wrong(f"'{where}' must be an object with 'type' and 'text'")
    if kind != "text":
        raise _wrong(f"'{where}' is of type {kind!r}, but this model serves text only: send parts of type 'text'")
    text = part.get("text")
    if not isinstance(text, str):
        raise _wrong(f"'{where}.text' must be text")
    return text


def _tool_call(call: object, where: str) -> Json:
    """OpenAI has the arguments as JSON in text; templates want the object, to write it in their own way."""
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise _wrong(f"'{where}' must be an object with 'function', that one with 'name' and 'arguments'")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        return call
    try:
        read = msgspec.json.decode(arguments or "{}", type=Json)
    except msgspec.DecodeError:
        raise _wrong(f"'{where}.function.arguments' must be a JSON object, written as text") from None
    return {**call, "function": {**function, "arguments": read}}


def _wrong(told: str) -> RequestError:
    return RequestError(told, param="messages")


def _tools(name: str, raw: msgspec.Raw) -> list[Json] | None:
    tools = decode(name, raw, list[Json], "a list of tools, each an object")
    for i, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not function.get("name"):
            told = f"'tools[{i}]' must be an object with 'type' \"function\" and a 'function' that has a 'name'"
            raise RequestError(told, param=name)
    return tools or None


def _template_kwargs(name: str, raw: msgspec.Raw) -> Json:
    values: Json = decode(name, raw, Json, "an object: variables of the chat template")
    if ours := sorted(_OURS & values.keys()):
        raise RequestError(f"'chat_template_kwargs' may not hold {ours[0]!r}, which is set by other means", param=name)
    return values


CONVERSATION: Readers = {
    "messages": _messages,
    "tools": _tools,
    "documents": read_as(list[Json], "a list of documents, each an object"),
    "chat_template_kwargs": _template_kwargs,
    "add_generation_prompt": read_as(bool, "true or false"),
    "continue_final_message": read_as(bool, "true or false"),
    "add_special_tokens": read_as(bool, "true or false"),
}
"""The fields that make a conversation, in chat completions and ``/tokenize`` alike."""
