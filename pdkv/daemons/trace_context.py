"""Whose trace a request belongs to, by W3C's Trace Context.

The trace's id is in every log line of the request, beside the transfer's, by which lines of engine processes are found.
Where no spans are recorded (``tracing.py``), what a client sends travels on to both workers as it came: a parent of
ours that nobody records would break the client's tree.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

_PARENT, _STATE = "traceparent", "tracestate"
_FORM = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?", re.ASCII)
_MOST_STATE = 512
"""Characters of the vendors' part that everybody must pass on; we pass on no more."""


class Trace(NamedTuple):
    """``headers`` are for those who are asked in turn; both are empty where the client sent no valid trace."""

    id: str
    headers: dict[str, str]


NO_TRACE = Trace("", {})


def trace_of(headers: Mapping[str, str]) -> Trace:
    """By a request's headers. What the standard calls invalid counts as absent."""
    parent = headers.get(_PARENT, "")
    found = _FORM.fullmatch(parent) if parent else None
    if found is None:
        return NO_TRACE
    version, trace, span, more = found.groups()
    if version == "ff" or (version == "00" and more) or not trace.strip("0") or not span.strip("0"):
        return NO_TRACE
    state = headers.get(_STATE, "")
    passed = {_PARENT: parent, _STATE: state} if state and len(state) <= _MOST_STATE else {_PARENT: parent}
    return Trace(trace, passed)
