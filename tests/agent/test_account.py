"""What a transfer is said to have taken, by a scripted clock."""

import pytest

from pdkv.agent.account import Account
from pdkv.agent.events import StartTransfer
from pdkv.agent.peer_links import PeerLink
from pdkv.agent.rank_reads import PagesRead, PostedBatch
from pdkv.schema import Incarnation, TransferId
from pdkv.wire.channel import Route


def begun(num_pages: int = 4) -> Account:
    start = StartTransfer(TransferId(b"t" * 16), "tcp://p", Incarnation(1), tuple(range(num_pages)), 500, 10.0)
    return Account(start, PeerLink("tcp://p", Incarnation(1), Route(0, incoming=False), 0.0), at=100.0)


def read_of(num_bytes: int, error: str = "") -> PagesRead:
    return PagesRead(1, 1, num_bytes, (PostedBatch(3, 0.001),), error)


def test_what_lands_after_done_is_exposed() -> None:
    account = begun()
    account.granted(100.5)
    account.granted(100.9)  # a copy
    account.posted(101.0)
    account.posted(101.5)
    account.posted_after(0.002)
    account.posted_after(0.001)
    account.read_ended(read_of(300), 102.0)
    account.done(102.5)
    account.done(102.9)  # a copy
    account.read_ended(read_of(100), 103.0)
    facts = account.facts(103.0, cached_tokens=128)
    assert (facts.exposed_s, facts.hidden_fraction) == (0.5, 0.75)
    assert (facts.granted_s, facts.posted_s) == (0.5, 0.002)
    assert (facts.read_s, facts.total_s, facts.num_spans) == (2.0, 3.0, 6)
    assert (facts.num_bytes, facts.bytes_before_done, facts.cached_tokens) == (400, 300, 128)


def test_what_lands_before_done_is_hidden() -> None:
    account = begun()
    account.posted(101.0)
    account.read_ended(read_of(400), 102.0)
    account.done(105.0)
    facts = account.facts(105.0, cached_tokens=0)
    assert (facts.exposed_s, facts.hidden_fraction, facts.resident_at) == (0.0, 1.0, 105.0)


def test_a_failed_read_brings_nothing() -> None:
    account = begun()
    account.posted(101.0)
    account.read_ended(read_of(400, "endpoint closed"), 102.0)
    account.done(103.0)
    assert account.facts(103.0, cached_tokens=0).num_bytes == 0
    assert account.seconds(103.0) == pytest.approx(3.0)


@pytest.mark.parametrize(("landed", "done"), [(103.0, 102.5), (101.0, 103.0)])
def test_what_comparing_holds_up_begins_when_all_is_there(landed: float, done: float) -> None:
    account = begun()
    account.posted(101.0)
    account.read_ended(read_of(400), landed)
    account.done(done)
    assert account.facts(103.0, cached_tokens=0).compared_s == 0.0
    facts = account.facts(103.25, cached_tokens=0)
    assert (facts.compared_s, facts.exposed_s, facts.resident_at) == (0.25, max(0.0, landed - done), 103.25)
