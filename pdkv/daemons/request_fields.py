"""Reads the fields of a request body strictly, and refuses by name whatever pdkv would not honour.

A field that pdkv does not implement is accepted only with the value that means "off"; anything else is refused by
name, because an answer that ignores what was asked is a wrong answer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec

from pdkv.errors import RequestError

MAX_STOPS = 16
"""OpenAI allows 4, but evaluation tasks send more."""
MAX_STOP_CHARACTERS = 1024
MAX_CHOICES = 128
"""Of one prompt."""
_INT64 = 2**63 - 1

Reader = Callable[[str, msgspec.Raw], Any]
"""Takes a field's name and its JSON, unread; gives its value or raises RequestError."""
Readers = Mapping[str, Reader]
Off = Mapping[str, Sequence[object]]
"""Fields that are not implemented, with the values (besides null) that ask for nothing."""

COMMON_OFF: Off = {
    "frequency_penalty": (0, 0.0),
    "presence_penalty": (0, 0.0),
    "logit_bias": ({},),
}


def read_fields(body: bytes) -> dict[str, msgspec.Raw]:
    """The fields of a JSON object, unread. Raises RequestError for anything else."""
    try:
        return msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise RequestError("the body must be a JSON object") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise RequestError(f"the body is not valid JSON: {exc}") from None


def read_values(fields: Mapping[str, msgspec.Raw], readers: Readers, off: Off | None = None) -> dict[str, Any]:
    """The values of all fields by name; null is as good as absent. Raises RequestError that names the wrong one."""
    values: dict[str, Any] = {}
    for name, raw in fields.items():
        if is_null(raw):
            continue
        if off is not None and name in off:
            _refuse_unless_off(name, raw, off[name])
        elif name in readers:
            values[name] = readers[name](name, raw)
        else:
            raise RequestError(f"unknown field {name!r}", param=name, code="unknown_parameter")
    return values


def begins(raw: msgspec.Raw, size: int) -> bytes:
    """The first ``size`` bytes of a field's JSON."""
    return bytes(memoryview(raw)[:size])


def is_null(raw: msgspec.Raw) -> bool:
    return begins(raw, 5) == b"null"


def decode(name: str, raw: msgspec.Raw, kind: Any, meaning: str) -> Any:
    """The field as a ``kind``. Raises RequestError; ``meaning`` completes "must be"."""
    try:
        return msgspec.json.decode(raw, type=kind)
    except (msgspec.DecodeError, UnicodeDecodeError):
        found = begins(raw, 40).decode("utf-8", "replace")
        raise RequestError(f"{name!r} must be {meaning}, found {found}", param=name) from None


def read_as(kind: Any, meaning: str) -> Reader:
    """A reader of fields of one type; ``meaning`` completes "must be"."""
    return lambda name, raw: decode(name, raw, kind, meaning)


def number(low: float, high: float, kind: Any, meaning: str) -> Reader:
    """A reader of numbers from ``low`` to ``high``, both included."""

    def read(name: str, raw: msgspec.Raw) -> Any:
        value = decode(name, raw, kind, meaning)
        if not low <= value <= high:
            raise RequestError(f"{name!r} must be {meaning}, found {value}", param=name)
        return value

    return read


def count(low: int, meaning: str) -> Reader:
    """A reader of whole numbers of at least ``low``."""
    return number(low, _INT64, int, meaning)


def _stop(name: str, raw: msgspec.Raw) -> tuple[str, ...]:
    value = decode(name, raw, str | list[str], "text or a list of texts")
    stops = [value] if isinstance(value, str) else value
    if isinstance(value, str) and not value:
        return ()
    if len(stops) > MAX_STOPS:
        raise RequestError(f"'stop' holds {len(stops)} texts; at most {MAX_STOPS} are served", param=name)
    if not all(0 < len(stop) <= MAX_STOP_CHARACTERS for stop in stops):
        raise RequestError(f"each text of 'stop' must have 1 to {MAX_STOP_CHARACTERS} characters", param=name)
    return tuple(stops)


def _include_usage(name: str, raw: msgspec.Raw) -> bool:
    options = decode(name, raw, dict[str, Any], "an object")
    for key, value in options.items():
        if key == "include_usage" and isinstance(value, bool | None):
            continue
        if key == "include_obfuscation" and value in (None, False):
            continue
        raise RequestError(f"'stream_options.{key}' is not supported with this value", param=name)
    return bool(options.get("include_usage"))


def _refuse_unless_off(name: str, raw: msgspec.Raw, off: Sequence[object]) -> None:
    value = decode(name, raw, Any, "valid JSON")
    if not any(value == one and type(value) is type(one) for one in off):
        only = f" or set it to {msgspec.json.encode(off[0]).decode()}" if off else ""
        raise RequestError(f"{name!r} is not supported; leave it out{only}", param=name, code="unsupported_parameter")


COMMON: Readers = {
    "model": read_as(str, "a model's name"),
    "temperature": number(0.0, 2.0, float, "a number from 0 (greedy) to 2"),
    "top_p": number(0.0, 1.0, float, "a number from 0 to 1"),
    "seed": number(-_INT64, _INT64, int, "a whole number of 64 bits"),
    "stop": _stop,
    "n": number(1, MAX_CHOICES, int, f"a whole number from 1 to {MAX_CHOICES}"),
    "stream": read_as(bool, "true or false"),
    "stream_options": _include_usage,
    "ignore_eos": read_as(bool, "true or false"),
    "return_token_ids": read_as(bool, "true or false"),
    "user": read_as(str, "text"),
}
"""What both kinds of request may hold, in the same form."""
