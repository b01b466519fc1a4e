"""The outbox: re-sent until acknowledged, newest of a kind only, every copy its own number."""

from pdkv.wire.messages import Acquire, Release, Watermark
from pdkv.wire.outbox import Outbox, ResendPolicy

POLICY = ResendPolicy(first_s=1.0, factor=2.0, longest_s=3.0, horizon_s=20.0)


def test_copies_are_numbered_and_spaced() -> None:
    outbox = Outbox(POLICY)
    first = outbox.put(Acquire(5.0), 10.0)
    assert outbox.due(10.9) == []
    sent = [(10.0, first.seq)]
    for tenth in range(109, 300):
        sent += [(tenth / 10, copy.seq) for copy in outbox.due(tenth / 10)]
    assert [when for when, _ in sent] == [10.0, 11.0, 13.0, 16.0, 19.0, 22.0, 25.0, 28.0]
    assert len({seq for _, seq in sent}) == len(sent)


def test_an_acknowledgement_tells_when_that_copy_was_sent() -> None:
    outbox = Outbox(POLICY)
    outbox.put(Acquire(5.0), 10.0)
    (second,) = outbox.due(11.0)
    settled = outbox.acknowledge(second.seq)
    assert settled is not None
    assert settled.sent_at == 11.0
    assert outbox.acknowledge(second.seq) is None
    assert outbox.next_due() is None


def test_only_the_newest_of_a_kind_is_sent_again() -> None:
    outbox = Outbox(POLICY)
    old = outbox.put(Watermark((1,)), 0.0)
    outbox.put(Watermark((2,)), 0.5)
    assert outbox.acknowledge(old.seq) is None
    assert [copy.body for copy in outbox.due(10.0)] == [Watermark((2,))]


def test_a_message_that_nobody_acknowledges_is_given_up() -> None:
    outbox = Outbox(POLICY)
    outbox.put(Release(), 0.0)
    assert outbox.due(20.0) == []
    assert len(outbox) == 0
