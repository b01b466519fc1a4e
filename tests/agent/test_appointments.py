"""Appointments against a plain dictionary, and agents that do not look at what has ended."""

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdkv.agent import events as e
from pdkv.agent.appointments import Appointments
from pdkv.core.decode_session import DecodeSession
from pdkv.core.prefill_session import PrefillSession
from pdkv.schema import TransferId
from tests.agent.workers import DecodeSide, PrefillSide

times = st.floats(0, 10, allow_nan=False)
ENDED = 40


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | times) | times, max_size=40))
def test_appointments_are_a_dictionary_in_order_of_time(steps: list[tuple[str, float | None] | float]) -> None:
    appointments: Appointments[str] = Appointments()
    expected: dict[str, float] = {}
    for step in steps:
        if isinstance(step, float):
            due = sorted((when, key) for key, when in expected.items() if when <= step)
            taken = appointments.take_due(step)
            assert sorted(taken) == sorted(key for _, key in due)
            assert [expected[key] for key in taken] == [when for when, _ in due]
            expected = {key: when for key, when in expected.items() if when > step}
        else:
            key, when = step
            appointments.set(key, when)
            expected.pop(key, None)
            if when is not None:
                expected[key] = when
        assert appointments.next_time() == min(expected.values(), default=None)


def test_what_has_ended_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sessions stay for minutes after their end, to answer late messages; a transfer does not look at them."""
    asked = []
    for kind in (DecodeSession, PrefillSession):
        original = kind.next_wakeup

        def counted(self: object, original: object = original) -> float | None:
            asked.append(self)
            return original(self)  # type: ignore[operator]

        monkeypatch.setattr(kind, "next_wakeup", counted)
    with contextlib.closing(PrefillSide()) as prefill, contextlib.closing(DecodeSide()) as decode:
        for number in range(ENDED + 1):
            if number == ENDED:
                asked.clear()
            transfer = TransferId(bytes([number]) * 16)
            decode.fetch(transfer, prefill, (7, 2, 3))
            prefill.serve(transfer, (3, 4, 9))
            decode.expect(e.TransferArrived, transfer)
            prefill.expect(e.PagesFreed, transfer)
        assert len({id(session) for session in asked}) <= ENDED / 4, "sessions that ended long ago were looked at"
