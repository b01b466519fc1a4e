"""Trace Context as W3C writes it: what is valid, and what is passed on."""

import pytest

from pdkv.daemons.trace_context import NO_TRACE, Trace, trace_of

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
PARENT = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize("parent", [PARENT, f"00-{TRACE}-{SPAN}-00", f"cc-{TRACE}-{SPAN}-01-what-comes-later"])
def test_a_valid_trace_is_passed_on_as_it_came(parent: str) -> None:
    assert trace_of({"traceparent": parent}) == Trace(TRACE, {"traceparent": parent})


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "x",
        TRACE,
        PARENT + "-more",  # version 0 has four parts
        PARENT.upper(),
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE}-{SPAN}-1",
        f" {PARENT}",
        f"{PARENT}\n",
    ],
)
def test_what_is_not_valid_counts_as_absent(parent: str) -> None:
    assert trace_of({"traceparent": parent, "tracestate": "a=1"}) == NO_TRACE


def test_vendors_state_goes_with_it_while_it_is_short() -> None:
    headers = {"traceparent": PARENT, "tracestate": "rojo=1,congo=2"}
    assert trace_of(headers).headers == headers
    assert trace_of({**headers, "tracestate": "a" * 513}).headers == {"traceparent": PARENT}
    assert trace_of({"tracestate": "a=1"}) == NO_TRACE
