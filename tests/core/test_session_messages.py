"""Which messages a transfer takes when nothing goes wrong, and what is said first: the first token waits for no
acknowledgement, and most of those are spared."""

from collections.abc import Sequence

from pdkv.core.decode_session import DecodeSession
from pdkv.core.events import (
    FreePages,
    LocalFailure,
    MessageArrived,
    PagesReserved,
    PrefillEnded,
    Progressed,
    Read,
    ReadEnded,
    Report,
    RequestArrived,
    Resume,
    Send,
    SessionPolicy,
    StartPrefill,
    Tick,
)
from pdkv.core.prefill_session import PrefillSession
from pdkv.core.residency import WantedBlocks
from pdkv.errors import FailureCode
from pdkv.wire.messages import Ack, Acquire, Cancel, Done, Granted, Release, Watermark

POLICY = SessionPolicy()
SOON = POLICY.resend.owe_s
TOKENS = 100


def sent(instructions: Sequence[object]) -> list[object]:
    return [one.body for one in instructions if isinstance(one, Send)]


def acknowledged(instructions: Sequence[object]) -> list[int]:
    return [body.seq for body in sent(instructions) if isinstance(body, Ack)]


def prefilling() -> PrefillSession:
    """It has the request, and Acquire as copy 7, at time 0."""
    session = PrefillSession(POLICY)
    session.handle(RequestArrived(TOKENS, 60.0), 0.0)
    started = session.handle(MessageArrived(7, Acquire(10.0)), 0.0)
    assert isinstance(started[0], StartPrefill)
    assert sent(started) == []
    return session


def receiving() -> DecodeSession:
    """Acquired at time 0, granted as copy 2."""
    session = DecodeSession(POLICY, WantedBlocks(TOKENS, 128, 0), 60.0, 0.0)
    (acquire,) = session.start(0.0)
    assert isinstance(acquire, Send)
    session.handle(MessageArrived(1, Ack(acquire.seq)), 0.0)
    assert sent(session.handle(MessageArrived(2, Granted((4,), TOKENS, 0)), 0.0)) == []
    return session


def test_prefill_acknowledges_acquire_with_granted() -> None:
    granted = prefilling().handle(PagesReserved((4,), 0), SOON / 2)
    assert sent(granted) == [Ack(7), Granted((4,), TOKENS, 0)]


def test_prefill_acknowledges_acquire_in_time_when_pages_are_not_to_be_had() -> None:
    session = prefilling()
    assert session.next_wakeup() == SOON < POLICY.resend.first_s / 2
    assert acknowledged(session.handle(Tick(), SOON)) == [7]
    assert sent(session.handle(PagesReserved((4,), 0), 2 * SOON)) == [Granted((4,), TOKENS, 0)]


def test_an_acquire_before_its_request_is_acknowledged_at_once() -> None:
    assert acknowledged(PrefillSession(POLICY).handle(MessageArrived(7, Acquire(10.0)), 0.0)) == [7]


def test_release_acknowledges_all_that_a_short_prompt_took() -> None:
    session = receiving()
    posted = session.handle(MessageArrived(3, Watermark((TOKENS,))), SOON / 2)
    (read,) = [one for one in posted if isinstance(one, Read)]
    assert sent(posted) == []
    session.handle(ReadEnded(read.read, True, ""), SOON / 2)
    arrived = session.handle(MessageArrived(4, Done(5, -0.5)), SOON / 2)
    assert sent(arrived) == [Release()]
    order = [type(one) for one in arrived]
    assert order.index(Resume) < order.index(Send)
    assert sent(session.handle(MessageArrived(5, Done(5, -0.5)), SOON)) == [Ack(5), Release()], "P may not have it yet"


def test_prefill_repeats_nothing_that_release_has_answered() -> None:
    session = prefilling()
    session.handle(PagesReserved((4,), 0), 0.0)
    session.handle(Progressed(TOKENS, None), 0.0)
    session.handle(PrefillEnded(5, -0.5, b""), 0.0)
    assert acknowledged(session.handle(MessageArrived(9, Release()), 0.01)) == [9]
    assert sent(session.handle(Tick(), 1.0)) == []


def test_a_longer_prompts_messages_are_acknowledged_together_and_in_time() -> None:
    session = receiving()
    session.handle(MessageArrived(3, Watermark((0,))), SOON / 2)
    due = session.next_wakeup()
    assert due == SOON
    assert acknowledged(session.handle(Tick(), due)) == [2, 3]


def test_done_is_acknowledged_at_once_when_reads_are_still_under_way() -> None:
    assert acknowledged(receiving().handle(MessageArrived(3, Done(5, -0.5)), 0.0)) == [2, 3]


def test_a_transfer_that_fails_acknowledges_what_it_owes() -> None:
    failed = receiving().handle(LocalFailure(FailureCode.CANCELLED, "enough"), 0.0)
    assert sent(failed) == [Ack(2), Cancel(FailureCode.CANCELLED, "enough")]


def begun_early() -> PrefillSession:
    """Its engine has pages before Acquire."""
    session = PrefillSession(POLICY)
    session.handle(RequestArrived(TOKENS, 60.0), 0.0)
    assert session.handle(PagesReserved((4,), 0), 0.0) == []
    return session


def test_what_began_early_is_told_when_acquire_comes() -> None:
    session = begun_early()
    assert session.handle(Progressed(64, None), 0.0) == []
    acquired = session.handle(MessageArrived(7, Acquire(10.0)), 0.1)
    assert isinstance(acquired[0], StartPrefill)
    assert sent(acquired) == [Ack(7), Granted((4,), TOKENS, 0), Watermark((64,))]
    assert sent(session.handle(PrefillEnded(5, -0.5, b""), 0.1)) == [Done(5, -0.5)]


def test_what_was_done_before_acquire_came_is_told_at_once() -> None:
    session = begun_early()
    session.handle(Progressed(TOKENS, None), 0.0)
    assert session.handle(PrefillEnded(5, -0.5, b"more"), 0.0) == []
    acquired = session.handle(MessageArrived(7, Acquire(10.0)), 0.1)
    assert sent(acquired) == [Ack(7), Granted((4,), TOKENS, 0), Done(5, -0.5, b"more")]


def test_pages_that_were_never_granted_come_back_as_soon_as_the_transfer_ends() -> None:
    given_up = begun_early().handle(LocalFailure(FailureCode.CANCELLED, "the router gave up"), 1.0)
    assert [type(one) for one in given_up] == [FreePages, Report]
    session = PrefillSession(POLICY)
    session.handle(RequestArrived(TOKENS, 1.0), 0.0)
    session.handle(PagesReserved((4,), 0), 0.0)
    assert session.next_wakeup() == 1.0
    assert [type(one) for one in session.handle(Tick(), 1.0)] == [FreePages, Report]


def test_pages_that_nobody_acquires_come_back_within_a_lease_and_what_began_begins_anew() -> None:
    """A decode worker may fail before it asks: its probe did, and pages stayed until the request's deadline."""
    session = begun_early()
    session.handle(Progressed(64, None), 0.0)
    due = session.next_wakeup()
    assert due == POLICY.lease.ttl_s
    assert [type(one) for one in session.handle(Tick(), due)] == [FreePages]
    assert session.handle(PrefillEnded(5, -0.5, b""), due) == []  # was under way
    assert session.next_wakeup() == 60.0
    acquired = session.handle(MessageArrived(7, Acquire(10.0)), due)
    assert [type(one) for one in acquired] == [StartPrefill]
    assert sent(session.handle(PagesReserved((5,), 0), due)) == [Ack(7), Granted((5,), TOKENS, 0)]
