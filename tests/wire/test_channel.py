"""The channel over real sockets: what arrives, what is dropped, and what may not be bound."""

import itertools
import time
from collections.abc import Iterator

import msgspec
import pytest
import zmq

from pdkv.errors import ConfigError
from pdkv.schema import Incarnation, TransferId
from pdkv.wire.admission import NoSecurity
from pdkv.wire.channel import Channel, Received, Route, is_loopback
from pdkv.wire.messages import MAX_BODY_BYTES, Ack, Acquire, Body, encode, make_envelope

P, D = Incarnation(0x1100000000000001), Incarnation(0x2200000000000002)
TRANSFER = TransferId(bytes(16))


@pytest.fixture
def prefill() -> Iterator[Channel]:
    channel = Channel(P, NoSecurity())
    channel.bind("tcp://127.0.0.1:0")
    yield channel
    channel.close()


@pytest.fixture
def decode() -> Iterator[Channel]:
    channel = Channel(D, NoSecurity())
    yield channel
    channel.close()


def wait_for(channel: Channel, what: str = "received", count: int = 1) -> list[Received]:
    """Poll until a counter of the channel has reached ``count``."""
    got: list[Received] = []
    deadline = time.monotonic() + 60
    while getattr(channel.statistics(), what) < count:
        assert time.monotonic() < deadline, f"{what} stayed at {channel.statistics()}"
        poller = zmq.Poller()
        for socket in channel.sockets():
            poller.register(socket, zmq.POLLIN)
        poller.poll(100)
        got += channel.receive()
    return got


def raw_sender(endpoint: str, identity: bytes) -> zmq.Socket[bytes]:
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.set(zmq.IDENTITY, identity)
    socket.set(zmq.LINGER, 0)
    socket.connect(endpoint)
    return socket


def send_when_connected(channel: Channel, route: object, body: Body, other: Channel) -> Received:
    """As an outbox does: send copies until one has come."""
    for seq in itertools.count():
        channel.send(route, make_envelope(channel.incarnation, other.incarnation, TRANSFER, seq), body)  # type: ignore[arg-type]
        poller = zmq.Poller()
        for socket in other.sockets():
            poller.register(socket, zmq.POLLIN)
        if poller.poll(50) and (got := list(other.receive())):
            return got[0]
    raise AssertionError


def test_messages_go_there_and_back(prefill: Channel, decode: Channel) -> None:
    route = decode.connect(prefill.endpoint)
    asked = send_when_connected(decode, route, Acquire(3.0), prefill)
    assert (asked.envelope.sender, asked.envelope.addressee, asked.body) == (D, P, Acquire(3.0))
    prefill.send(asked.route, make_envelope(P, D, TRANSFER, 1), Ack(asked.envelope.seq))
    (answer,) = wait_for(decode)
    assert answer.body == Ack(asked.envelope.seq)
    assert answer.route == route


@pytest.mark.parametrize(
    "frames",
    [
        [b"one"],
        [b"a", b"b", b"c"],
        [b"\x00" * 2000, b""],
        [encode(make_envelope(D, P, TRANSFER, 1), Ack(1))[0], b"\xff\xff"],
        [encode(make_envelope(D, P, TRANSFER, 1), Ack(1))[0], bytes(MAX_BODY_BYTES + 1)],
        [encode(make_envelope(Incarnation(5), P, TRANSFER, 1), Ack(1))[0], msgspec.msgpack.encode(Ack(1))],
        [
            msgspec.msgpack.encode(msgspec.structs.replace(make_envelope(D, P, TRANSFER, 1), version=99)),
            msgspec.msgpack.encode(Ack(1)),
        ],
    ],
    ids=["one frame", "three frames", "huge envelope", "bad body", "huge body", "false sender", "other version"],
)
def test_what_breaks_the_protocol_is_counted_and_harms_nobody(
    frames: list[bytes], prefill: Channel, decode: Channel
) -> None:
    bad = raw_sender(prefill.endpoint, D.to_bytes(8, "big"))
    bad.send_multipart(frames)
    wait_for(prefill, "dropped")
    bad.send_multipart(encode(make_envelope(D, P, TRANSFER, 2), Ack(7)))
    assert [r.body for r in wait_for(prefill)] == [Ack(7)], "the channel itself must live on"
    bad.close(0)


def test_a_sender_without_an_incarnation_is_dropped(prefill: Channel) -> None:
    bad = raw_sender(prefill.endpoint, b"me")
    bad.send_multipart(encode(make_envelope(D, P, TRANSFER, 1), Ack(1)))
    wait_for(prefill, "dropped")
    assert prefill.statistics().received == 0
    bad.close(0)


def test_what_nobody_can_take_is_counted(prefill: Channel, decode: Channel) -> None:
    prefill.send(Route(key=12345, incoming=True), make_envelope(P, D, TRANSFER, 1), Ack(1))
    assert prefill.statistics().undeliverable == 1
    route = decode.connect("tcp://127.0.0.1:1")
    decode.send(route, make_envelope(D, P, TRANSFER, 1), Ack(1))
    decode.disconnect(route)
    decode.disconnect(route)
    decode.send(route, make_envelope(D, P, TRANSFER, 1), Ack(1))
    assert decode.statistics().undeliverable == 1


def test_what_is_sent_before_the_connection_stands_waits_for_it(decode: Channel) -> None:
    prefill = Channel(P, NoSecurity())
    endpoint = prefill.bind("tcp://127.0.0.1:0")
    prefill.close()
    route = decode.connect(endpoint)
    decode.send(route, make_envelope(D, P, TRANSFER, 1), Ack(1))
    prefill = Channel(P, NoSecurity())
    prefill.bind(endpoint)
    assert [r.body for r in wait_for(prefill)] == [Ack(1)]
    prefill.close()


def test_what_was_sent_before_the_end_is_received_after_it(prefill: Channel, decode: Channel) -> None:
    """The last word of a worker that ends must not hang on how fast its peer reads."""
    route = decode.connect(prefill.endpoint)
    asked = send_when_connected(decode, route, Acquire(3.0), prefill)
    (dealer,) = (socket for socket in decode.sockets() if socket.type == zmq.DEALER)
    dealer.disable_monitor()  # the channel's own, which asks for other events
    ends: zmq.Socket[bytes] = dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
    prefill.send(asked.route, make_envelope(P, D, TRANSFER, 1), Ack(1))
    prefill.close()
    ended = ends.poll(10_000)
    dealer.disable_monitor()
    ends.close(0)
    assert ended, "decode has seen the end of the connection"
    assert [r.body for r in wait_for(decode)] == [Ack(1)]


def test_beyond_loopback_only_when_spelled_out(decode: Channel) -> None:
    with pytest.raises(ConfigError, match="--insecure"):
        decode.bind("tcp://0.0.0.0:0")
    with pytest.raises(ConfigError, match="only loopback is allowed"):
        decode.connect("tcp://192.0.2.1:7400")
    insecure = Channel(D, NoSecurity(), insecure=True)
    assert insecure.bind("tcp://0.0.0.0:0").startswith("tcp://0.0.0.0:")
    insecure.close()


@pytest.mark.parametrize("endpoint", ["nonsense", "tcp://127.0.0.1:notaport"])
def test_bad_endpoints_are_told(endpoint: str) -> None:
    channel = Channel(D, NoSecurity(), insecure=True)
    with pytest.raises(ConfigError, match="control channel cannot"):
        channel.bind(endpoint)
    with pytest.raises(ConfigError, match="control channel cannot"):
        channel.connect(endpoint)
    channel.close()


def test_a_taken_port_is_told(prefill: Channel, decode: Channel) -> None:
    with pytest.raises(ConfigError, match="cannot listen"):
        decode.bind(prefill.endpoint)


@pytest.mark.parametrize(
    ("endpoint", "local"),
    [
        ("tcp://127.0.0.1:1", True),
        ("tcp://[::1]:1", True),
        ("tcp://localhost:1", True),
        ("ipc:///tmp/x", True),
        ("tcp://10.0.0.1:1", False),
        ("tcp://*:1", False),
        ("tcp://0.0.0.0:1", False),
        ("tcp://example.org:1", False),
    ],
)
def test_is_loopback(endpoint: str, local: bool) -> None:
    assert is_loopback(endpoint) is local
