"""Several ways behind one: the best that works is taken, what fails early goes by the next, and the reason is told."""

import logging
import mmap
import os
import select

import msgspec
import numpy as np
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport import auto
from pdkv.transport.auto import AutoTransport, Way
from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance_memory import HiddenArray
from pdkv.transport.inproc import Faults, InprocTransport
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.shm import ShmTransport
from pdkv.transport.sockets import STAGED, SocketTransport
from pdkv.transport.ucx import UcxTransport

from .reading import ended, filled, read, span

OK, FAILED = ReadStatus.OK, ReadStatus.FAILED
REACH = {"shm": "shm", "sockets": "tcp", "ucx": "tcp", "inproc": "inproc"}


@pytest.fixture
def make():
    made: list[AutoTransport] = []

    def of(*transports, reach=None):
        made.append(AutoTransport([Way(t, (reach or REACH)[t.name]) for t in transports]))
        return made[-1]

    yield of
    for transport in reversed(made):
        transport.close()


@pytest.fixture
def pair(make):
    """A target that holds 100,000 sevens, and a reader, both with shared memory and sockets."""
    target, reader = make(ShmTransport(), SocketTransport()), make(ShmTransport(), SocketTransport())
    source, into = filled(100_000, 7), filled(200_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    yield target, reader, into
    reader.close()
    target.close()  # before its memory goes


def without(address: TransportAddress, broken: str) -> TransportAddress:
    """The address with the socket of one way renamed or moved to where nobody listens."""
    parts = msgspec.msgpack.decode(unseal(b"pdkvaut1", address.address, ""), type=list[auto._Part])
    spoiled = [spoil(part) if part.address.transport == broken else part for part in parts]
    return msgspec.structs.replace(address, address=seal(b"pdkvaut1", msgspec.msgpack.encode(spoiled)))


def spoil(part):
    magic = {"shm": b"pdkvshm1", "sockets": b"pdkvtcp1"}[part.address.transport]
    fields = msgspec.msgpack.decode(unseal(magic, part.address.address, ""))
    if part.address.transport == "shm":
        fields[1], fields[3] = b"pdkv-nobody", 0
    else:
        fields[2] = bytes(len(fields[2]))
    address = msgspec.structs.replace(part.address, address=seal(magic, msgspec.msgpack.encode(fields)))
    return msgspec.structs.replace(part, address=address)


def test_one_host_is_read_by_mapping(pair, caplog):
    caplog.set_level(logging.INFO, logger="pdkv.transport.auto")
    target, reader, into = pair
    peer = reader.connect(target.address())
    assert reader.path(peer) == "unknown"
    assert read(reader, peer, into, 100_000).status is OK
    assert reader.path(peer) == "shm"
    assert "is read by shm over shm" in caplog.text


def test_reads_asked_of_a_way_that_fails_go_by_the_next(pair, caplog):
    """Several at once, whose arrays the caller has changed since: every byte comes, and the reason is told."""
    target, reader, into = pair
    peer = reader.connect(without(target.address(), "shm"))
    batches = [span(0, into.memory.address + 10_000 * i, 9_999) for i in range(10)]
    reads = {reader.submit(peer, batch) for batch in batches}
    for batch in batches:
        batch.local[:] = -1
    statuses = {}
    while len(statuses) < len(reads):
        assert select.select([reader.fileno()], [], [], 60)[0], "nothing completes"
        statuses |= {completion.read: completion.status for completion in reader.poll()}
    assert statuses == dict.fromkeys(reads, OK)
    for i in range(10):
        assert (into.bytes[10_000 * i : 10_000 * i + 9_999] == 7).all()
        assert into.bytes[10_000 * i + 9_999] == 0
    assert reader.path(peer) == "tcp"
    assert "cannot be read by shm, trying sockets: the peer's memory cannot be had" in caplog.text


def test_all_ways_failing_fails_the_read_with_all_reasons(pair):
    target, reader, into = pair
    peer = reader.connect(without(without(target.address(), "shm"), "sockets"))
    for _ in range(2):
        completion = read(reader, peer, into, 100)
        assert completion.status is FAILED
        assert "shm: the peer's memory cannot be had" in completion.error
        assert "sockets: cannot connect" in completion.error
    assert reader.path(peer) == "unknown"
    assert not into.bytes.any()


def test_a_bad_batch_is_no_reason_to_leave_a_way(pair, caplog):
    target, reader, into = pair
    peer = reader.connect(target.address())
    reader.submit(peer, span(99_999, into.memory.address, 2))
    assert ended(reader).error == "the range lies outside the peer's memory"
    assert read(reader, peer, into, 100).status is OK
    assert reader.path(peer) == "shm"
    assert not caplog.records


def test_an_empty_batch_proves_nothing(pair):
    target, reader, into = pair
    peer = reader.connect(without(target.address(), "shm"))
    none = np.empty(0, np.int64)
    reader.submit(peer, msgspec.structs.replace(span(0, 0, 1), memory=none, remote=none, local=none, length=none))
    assert ended(reader).status is OK
    assert read(reader, peer, into, 100).status is OK
    assert reader.path(peer) == "tcp"


def test_a_proven_way_is_kept_when_it_fails(pair):
    """Its failures are the peer's: nothing is asked again of a peer that has ended."""
    target, reader, into = pair
    peer = reader.connect(target.address())
    assert read(reader, peer, into, 100).status is OK
    target.close()
    completion = read(reader, peer, into, 100)
    assert completion.status is FAILED
    assert completion.error == "the peer has ended"


def test_a_way_is_as_good_as_its_worse_end(make):
    """Only one side of the first pair has a network card, so UCX would travel by TCP."""
    with_card, without_card = dict(REACH, ucx="rdma"), REACH
    source, into = filled(1_000, 7), filled(1_000, 0)
    for far, near, name in ((without_card, with_card, "sockets"), (with_card, with_card, "ucx")):
        target = make(SocketTransport(), UcxTransport(), reach=far)
        reader = make(SocketTransport(), UcxTransport(), reach=near)
        target.register(source.memory)
        reader.register(into.memory)
        assert reader._ways_to(auto._parts(target.address()))[0][0].name == name


def test_a_way_that_cannot_register_is_left_out_and_the_reason_told(make, caplog):
    caplog.set_level(logging.INFO, logger="pdkv.transport.auto")
    target, reader = make(ShmTransport(), SocketTransport()), make(ShmTransport(), SocketTransport())
    fd = os.memfd_create("pdkv-test")  # cannot be sealed
    os.ftruncate(fd, 4096)
    mapping = mmap.mmap(fd, 4096)
    target.register(LocalMemory(np.frombuffer(mapping, dtype=np.uint8).ctypes.data, 4096, memfd=fd))
    os.close(fd)
    assert "not reading or serving by shm: the memfd of 4096 bytes cannot be shared" in caplog.text
    into = filled(4096, 1)
    reader.register(into.memory)
    peer = reader.connect(target.address())
    assert read(reader, peer, into, 4096).status is OK
    assert (reader.path(peer), into.bytes.any()) == ("tcp", False)
    with pytest.raises(TransportError, match="no transport can register"):
        reader.register(LocalMemory(4096, 4096, device="cuda:0"))


def test_peers_with_one_transport_only_are_read_too(make):
    target = SocketTransport()
    reader = make(ShmTransport(), SocketTransport())
    source, into = filled(1_000, 7), filled(1_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    assert read(reader, reader.connect(target.address()), into, 1_000).status is OK
    target.close()
    with pytest.raises(TransportError, match="no way is common to both"):
        make(ShmTransport()).connect(target.address())


def test_closing_a_peer_between_two_ways_ends_its_reads(make):
    """The first way fails a read whose peer is closed before that is known: it is not asked again."""
    failing = InprocTransport(Faults(seed=1, fail=1.0))
    target, reader = make(InprocTransport(), SocketTransport()), make(failing, SocketTransport())
    source, into = filled(1_000, 7), filled(1_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    parts = auto._parts(target.address())
    assert reader._ways_to(parts)[-1][0].name == "inproc", "a reach that has no rank comes last"
    peer = reader.connect(msgspec.structs.replace(parts[0].address))
    reader.submit(peer, span(0, into.memory.address, 10))
    reader.close_peer(peer)
    assert ended(reader).status is not OK
    assert not into.bytes.any()


class Crawling(InprocTransport):
    """Carries every byte, at a rate that nobody wants."""

    def note(self, peer):
        return "an ox cart"

    def crawls(self, peer):
        return True


CART_FIRST = {"inproc": "rdma", "sockets": "tcp"}


def test_a_way_that_crawls_is_given_up_for_another(make, caplog):
    """What it carried before that was known is read again, so that the way that is told is the way that was proven."""
    caplog.set_level(logging.INFO, logger="pdkv.transport.auto")
    target = make(Crawling(), SocketTransport(), reach=CART_FIRST)
    reader = make(Crawling(), SocketTransport(), reach=CART_FIRST)
    source, into = filled(1_000, 7), filled(1_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    peer = reader.connect(target.address())
    assert read(reader, peer, into, 1_000).status is OK
    assert (into.bytes == 7).all()
    assert (reader.path(peer), reader.note(peer), reader.crawls(peer)) == ("tcp", "", False)
    assert "cannot be read by inproc, trying sockets: it would crawl: an ox cart" in caplog.text
    assert "is read by sockets over tcp (inproc: it would crawl" in caplog.text


def test_a_way_that_crawls_is_better_than_none(make, caplog):
    target = make(Crawling(), SocketTransport(), reach=CART_FIRST)
    reader = make(Crawling(), SocketTransport(), reach=CART_FIRST)
    source, into = filled(1_000, 7), filled(1_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    peer = reader.connect(without(target.address(), "sockets"))
    assert read(reader, peer, into, 1_000).status is OK
    assert (reader.path(peer), reader.note(peer), reader.crawls(peer)) == ("inproc", "an ox cart", True)
    assert "cannot be read by sockets, trying inproc: cannot connect" in caplog.text
    assert "by inproc and nothing better: reads will crawl" in caplog.text


def test_memory_that_processors_cannot_touch_is_staged_and_said_so(make, caplog):
    caplog.set_level(logging.INFO, logger="pdkv.transport.auto")
    target, reader = make(ShmTransport(), SocketTransport()), make(ShmTransport(), SocketTransport())
    source, into = HiddenArray(3_000_000), HiddenArray(3_000_000)
    source.fill(7)
    target.register(source.memory)
    reader.register(into.memory)
    assert "not reading or serving by shm: shm cannot register" in caplog.text
    peer = reader.connect(target.address())
    reader.submit(peer, span(0, into.memory.address, 3_000_000))
    assert ended(reader).status is OK
    assert (into.bytes == 7).all()
    assert reader.note(peer) == STAGED
    assert f"is read by sockets over tcp, {STAGED}" in caplog.text
