"""Keys over real sockets: who is let in, who is not and how both sides learn of it, and what a wire-tapper reads."""

import contextlib
import pickle
import select
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from pdkv.errors import FailureCode, KeyRefusal
from pdkv.schema import Incarnation, TransferId
from pdkv.wire.admission import ChannelSecurity, NoSecurity, Refused
from pdkv.wire.channel import Channel, Received, Route
from pdkv.wire.curve import CurveSecurity, Keys, PublicKey, SecretKey
from pdkv.wire.messages import Ack, Failed, make_envelope

P, D = Incarnation(0x1100000000000001), Incarnation(0x2200000000000002)
TRANSFER = TransferId(bytes(16))
A, B = SecretKey.new(), SecretKey.new()
PATIENCE_S = 60.0


def keyed(secret: SecretKey, *others: PublicKey) -> CurveSecurity:
    return CurveSecurity(Keys.of(secret, others))


class Two:
    """A P that listens, and a D that greets it; both are polled by this thread."""

    def __init__(self, of_p: ChannelSecurity, of_d: ChannelSecurity) -> None:
        self.prefill, self.decode = Channel(P, of_p), Channel(D, of_d)
        self.prefill.bind("tcp://127.0.0.1:0")
        self.got: list[Received] = []
        self.kept_out: dict[str, list[Refused]] = {"P": [], "D": []}

    def greet(self, address: str = "") -> Route:
        route = self.decode.connect(address or self.prefill.endpoint)
        self.decode.send(route, make_envelope(D, P, TRANSFER, 1), Ack(1))
        return route

    def turn(self) -> None:
        poller = zmq.Poller()
        for each in (*self.prefill.sockets(), *self.decode.sockets()):
            poller.register(each, zmq.POLLIN)
        poller.poll(20)
        for name, channel in (("P", self.prefill), ("D", self.decode)):
            self.got += channel.receive()
            self.kept_out[name] += channel.take_refused()

    def until_heard(self) -> Received:
        return self._until(lambda: self.got)[0]

    def until_kept_out(self, *sides: str) -> None:
        self._until(lambda: all(self.kept_out[side] for side in sides))

    def reasons(self, side: str) -> set[KeyRefusal]:
        return {refused.reason for refused in self.kept_out[side]}

    def close(self) -> None:
        self.decode.close()
        self.prefill.close()

    def _until(self, condition):  # type: ignore[no-untyped-def]
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, (self.got, self.kept_out)
            self.turn()
        return found


@contextlib.contextmanager
def two(of_p: ChannelSecurity, of_d: ChannelSecurity) -> Iterator[Two]:
    pair = Two(of_p, of_d)
    try:
        yield pair
    finally:
        pair.close()


@pytest.mark.parametrize(
    ("of_p", "of_d"),
    [(keyed(A), keyed(A)), (keyed(A, B.public()), keyed(B, A.public()))],
    ids=["one key for all", "a key each"],
)
def test_accepted_keys_are_let_in_both_ways(of_p: CurveSecurity, of_d: CurveSecurity) -> None:
    with two(of_p, of_d) as pair:
        assert pair.prefill.endpoint.endswith(f"#{of_p.fingerprint}")
        route = pair.greet()
        asked = pair.until_heard()
        assert (asked.envelope.sender, asked.body) == (D, Ack(1))
        pair.got.clear()
        pair.prefill.send(asked.route, make_envelope(P, D, TRANSFER, 2), Ack(7))
        answer = pair.until_heard()
        assert (answer.body, answer.route) == (Ack(7), route)
        assert pair.kept_out == {"P": [], "D": []}


def test_a_key_that_is_not_accepted_is_turned_away_and_both_sides_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with two(keyed(A), keyed(B, A.public())) as pair:
        route = pair.greet()
        pair.until_kept_out("P", "D")
        assert pair.got == []
        (ours,), (theirs,) = pair.kept_out["P"], pair.kept_out["D"]
        assert (ours.reason, ours.dealer) == (KeyRefusal.UNKNOWN_KEY, None)
        assert f"from 127.0.0.1 holds key {B.public().fingerprint}, which this worker does not accept" in ours.message
        assert (theirs.reason, theirs.dealer) == (KeyRefusal.REFUSED_BY_PEER, route.key)
        assert f"refused our key {B.public().fingerprint}: put its public key" in theirs.message
        assert {pair.prefill.statistics().refused, pair.decode.statistics().refused} == {1}
    logged = [record.getMessage() for record in caplog.records]
    assert any("which this worker does not accept" in line for line in logged)
    assert any("refused our key" in line for line in logged)


@pytest.mark.parametrize(
    ("of_p", "of_d", "at_d", "at_p", "told"),
    [
        (keyed(A), NoSecurity(), "without_keys", {"peer_without_keys"}, "speaks only with keys"),
        (NoSecurity(), keyed(A), "peer_without_keys", {"without_keys"}, "speaks without keys"),
        (keyed(A, B.public()), keyed(B), "unknown_key", {"other_key"}, "holds key"),
    ],
    ids=["none against keys", "keys against none", "another fleet's"],
)
def test_what_cannot_fit_is_told_exactly_by_the_side_that_dials(
    of_p: ChannelSecurity, of_d: ChannelSecurity, at_d: str, at_p: set[str], told: str
) -> None:
    """The side that listens sees as much, or that a connection broke off, whichever libzmq noticed first."""
    with two(of_p, of_d) as pair:
        route = pair.greet()
        pair.until_kept_out("P", "D")
        pair.decode.disconnect(route)  # as the agent does
        assert pair.reasons("D") == {at_d}
        assert pair.reasons("P") <= at_p | {"broken_off"}
        assert told in pair.kept_out["D"][0].message
        bare = pair.prefill.endpoint.partition("#")[0]
        assert all(f" at {bare}" in refused.message for side in ("P", "D") for refused in pair.kept_out[side])
        assert pair.got == []


def test_a_worker_that_lost_the_key_of_its_address_is_noticed() -> None:
    """As after a restart with other keys, while D still has the old address: nothing foretells it."""
    with two(keyed(B), keyed(A, B.public())) as pair:
        bare, _, _ = pair.prefill.endpoint.partition("#")
        route = pair.greet(f"{bare}#{A.public().fingerprint}")
        pair.until_kept_out("P", "D")
        pair.decode.disconnect(route)
        assert pair.reasons("P") == {KeyRefusal.OTHER_KEY}
        assert pair.reasons("D") == {KeyRefusal.OTHER_KEY}
        assert "no longer holds the key" in pair.kept_out["D"][0].message
        assert pair.got == []


def test_an_address_without_a_key_is_tried_with_the_own_one() -> None:
    with two(keyed(A), keyed(A)) as pair:
        pair.greet(pair.prefill.endpoint.partition("#")[0])
        assert pair.until_heard().body == Ack(1)


def test_keys_rotate_without_a_moment_in_which_workers_part() -> None:
    """All accept the new key; some have it and some have not yet; all have it; the old one goes."""
    old, new = A, B
    accepts_both = [keyed(old, new.public()), keyed(new, old.public())]
    steps = [
        [keyed(old), accepts_both[0]],
        accepts_both,
        [accepts_both[1], keyed(new)],
    ]
    for step in steps:
        for of_p in step:
            for of_d in step:
                with two(of_p, of_d) as pair:
                    pair.greet()
                    assert pair.until_heard().body == Ack(1)
                    assert pair.kept_out == {"P": [], "D": []}


class Tap:
    """A proxy that passes on, and keeps, every byte in both directions."""

    def __init__(self, target: str) -> None:
        host, _, port = target.removeprefix("tcp://").partition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._end, self._ended = socket.socketpair()
        self.bytes = bytearray()
        self.endpoint = f"tcp://127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def close(self) -> None:
        self._end.close()
        self._thread.join()
        self._listener.close()
        self._ended.close()

    def _run(self) -> None:
        other: dict[socket.socket, socket.socket] = {}
        while True:
            ready, _, _ = select.select([self._listener, self._ended, *other], [], [])
            if self._ended in ready:
                break
            for each in ready:
                if each is self._listener:
                    near, far = each.accept()[0], socket.create_connection(self._target)
                    other |= {near: far, far: near}
                elif each in other:
                    self._pass_on(each, other)
        for each in other:
            each.close()

    def _pass_on(self, each: socket.socket, other: dict[socket.socket, socket.socket]) -> None:
        with contextlib.suppress(ConnectionError):
            if passed := each.recv(1 << 16):
                self.bytes += passed
                other[each].sendall(passed)
                return
        for end in (each, other[each]):
            other.pop(end).close()


@pytest.mark.parametrize(("security", "readable"), [(NoSecurity(), True), (keyed(A), False)], ids=["plain", "keys"])
def test_who_listens_in_reads_nothing_where_there_are_keys(security: ChannelSecurity, readable: bool) -> None:
    known = "0123456789 a word that everybody knows 9876543210"
    with two(security, security) as pair:
        bare, _, fingerprint = pair.prefill.endpoint.partition("#")
        tap = Tap(bare)
        with contextlib.closing(tap):
            route = pair.decode.connect(f"{tap.endpoint}#{fingerprint}" if fingerprint else tap.endpoint)
            pair.decode.send(route, make_envelope(D, P, TRANSFER, 1), Failed(FailureCode.INTERNAL, known))
            asked = pair.until_heard()
            assert isinstance(asked.body, Failed)
            assert asked.body.message == known
            pair.got.clear()
            pair.prefill.send(asked.route, make_envelope(P, D, TRANSFER, 1), Failed(FailureCode.INTERNAL, known))
            pair.until_heard()
        assert len(tap.bytes) > 2 * len(known)
        assert (known.encode() in tap.bytes) is readable
        assert A.reveal() not in tap.bytes


def test_without_a_desk_nobody_is_let_in() -> None:
    """What keeps the server shut does not hang on the desk being there."""
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
    server, client = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    security = keyed(A)
    security.secure_server(server)
    security.secure_client(client, security.fingerprint)
    server.bind("tcp://127.0.0.1:0")
    seen: zmq.Socket[bytes] = server.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL)
    client.connect(server.last_endpoint.decode())
    client.send(b"let me in", zmq.DONTWAIT)
    assert seen.poll(60_000)
    assert not server.poll(0)
    server.disable_monitor()
    for each in (server, client, seen):
        each.close(0)
    context.term()


def test_a_channel_that_ends_leaves_no_thread_and_no_descriptor() -> None:
    """Also with handshakes under way that nobody will judge any more."""

    def held() -> tuple[int, int]:
        return len(list(Path("/proc/self/task").iterdir())), len(list(Path("/proc/self/fd").iterdir()))

    def leave_some() -> None:
        with two(keyed(A), keyed(A)) as pair:
            pair.greet()
            pair.until_heard()
        with two(keyed(A), keyed(B, A.public())) as pair:
            pair.greet()
            pair.until_kept_out("P", "D")
        with two(keyed(A), keyed(A)) as pair:
            route = pair.greet()
            (desk,) = (each for each in pair.prefill.sockets() if each.type == zmq.REP)
            assert desk.poll(60_000)  # and the question stays there
            pair.decode.disconnect(route)  # what it would have said is not waited for

    leave_some()
    before = held()
    leave_some()
    deadline = time.monotonic() + PATIENCE_S
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, (before, held())
        time.sleep(0.02)


def test_a_secret_is_shown_by_nothing_that_holds_it() -> None:
    keys = Keys.of(A, (B.public(),))
    for shown in (repr(A), str(A), f"{keys!r}", f"{keys}"):
        assert A.reveal().hex() not in shown
        assert repr(A.reveal()) not in shown
    assert repr(A) == "SecretKey(...)"
    with pytest.raises(TypeError, match="does not travel"):
        pickle.dumps(A)


def test_the_own_key_is_accepted_and_nothing_counts_twice() -> None:
    keys = Keys.of(A, (A.public(), B.public(), B.public()))
    assert keys.accepted == (A.public(), B.public())
    assert keys.own == A.public()
    assert len(keys.own.fingerprint) == 16
