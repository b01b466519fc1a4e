"""Reads the body of a completions request."""

import msgspec

from pdkv.daemons.generation import Options
from pdkv.daemons.request_fields import (
    COMMON,
    COMMON_OFF,
    Off,
    Readers,
    begins,
    count,
    decode,
    number,
    read_as,
    read_fields,
    read_values,
)
from pdkv.errors import RequestError
from pdkv.m3.logprobs import MAX_TOP

DEFAULT_MAX_TOKENS = 16
"""OpenAI's."""

Prompt = str | list[int]


class CompletionRequest(msgspec.Struct, frozen=True):
    """A completions request whose fields have the right types; what depends on the model is checked later."""

    prompts: list[Prompt]
    """One choice each, or ``n``, in this order."""
    max_tokens: int = DEFAULT_MAX_TOKENS
    """0, with ``echo`` only: nothing but the prompt."""
    options: Options = Options()


def parse_completion(body: bytes) -> CompletionRequest:
    """Read a request body strictly: a bool is no number, "5" is no 5. Raises RequestError that names the field."""
    fields = read_fields(body)
    if "prompt" not in fields:
        raise RequestError("the field 'prompt' is missing: text or a list of token ids", param="prompt")
    prompts = _prompts(fields.pop("prompt"))
    values = read_values(fields, _FIELDS, _OFF)
    asked = CompletionRequest(prompts, values.get("max_tokens", DEFAULT_MAX_TOKENS), Options.of(values))
    if asked.max_tokens == 0 and not asked.options.echo:
        raise RequestError("'max_tokens' 0 asks for nothing; it is allowed with 'echo': true only", param="max_tokens")
    return asked


def _prompts(raw: msgspec.Raw) -> list[Prompt]:
    """Text, token ids, or a list of either; the first item says which."""
    first = begins(raw, 64).lstrip()[:1]
    if first == b'"':
        return [decode("prompt", raw, str, "valid text")]
    if first != b"[":
        raise RequestError("'prompt' must be text, a list of token ids, or a list of these", param="prompt")
    rest = begins(raw, 256).lstrip()[1:].lstrip()[:1]
    if rest == b'"':
        return list(decode("prompt", raw, list[str], "text, or a list of nothing but texts"))
    if rest == b"[":
        return list(decode("prompt", raw, list[list[int]], "a list of nothing but lists of token ids"))
    return [decode("prompt", raw, list[int], "text or a list of whole numbers (token ids)")]


_FIELDS: Readers = {
    **COMMON,
    "max_tokens": count(0, "a whole number of at least 1, or 0 with 'echo'"),
    "logprobs": number(0, MAX_TOP, int, f"a whole number from 0 to {MAX_TOP}"),
    "echo": read_as(bool, "true or false"),
}
_OFF: Off = {**COMMON_OFF, "best_of": (1,), "suffix": ("",)}
