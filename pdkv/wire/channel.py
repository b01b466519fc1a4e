"""The control channel: zmq sockets that carry envelopes and bodies between workers.

P binds one ROUTER; D connects one DEALER to the address of each P. The zmq identity is the sender's incarnation, so
nothing reaches, or comes from, the wrong life of a worker. Delivery is not promised here: outboxes send again. What
breaks the protocol is counted, logged and dropped, and harms nobody else.

A P with keys names its own in its address, by fingerprint: ``tcp://HOST:PORT#0123456789abcdef``. So a D knows whom it
must find there, and whether that can be.
"""

import ipaddress
import logging
import struct
from collections.abc import Container, Iterator

import msgspec
import zmq

from pdkv.errors import ConfigError, ProtocolError, TransportError
from pdkv.schema import PROTOCOL_VERSION, Incarnation
from pdkv.wire.admission import Admission, ChannelSecurity, PeerAddress, Refused
from pdkv.wire.messages import Body, Envelope, OtherVersion, decode_body, decode_envelope, encode

_LOG = logging.getLogger("pdkv.wire.channel")
_IDENTITY = struct.Struct(">Q")
_HARD_LIMIT_BYTES = 64 << 20
"""zmq cuts a connection that announces a larger frame; anything below is read, judged and counted here."""
_RECEIVE_AT_ONCE = 256
_CLOSING_LINGER_MS = 1000
"""How long the last words of a worker that ends are tried to be delivered."""


class Received(msgspec.Struct, frozen=True):
    route: "Route"
    envelope: Envelope
    body: Body | OtherVersion


class Route(msgspec.Struct, frozen=True):
    """Where answers go: a peer known to the ROUTER by identity (D's messages at P), or a DEALER's key (P's at D)."""

    key: int
    incoming: bool


class ChannelStatistics(msgspec.Struct, frozen=True):
    sent: int
    received: int
    dropped: int
    """Messages that broke the protocol: unreadable, too large, wrong sender, another version."""
    undeliverable: int
    """Messages that no connection could take; outboxes send again."""
    refused: int = 0
    """Connections that keys have kept from standing."""


class Channel:
    """All control connections of one worker. Owned by one thread; nothing here blocks."""

    def __init__(self, incarnation: Incarnation, security: ChannelSecurity, *, insecure: bool = False) -> None:
        self.incarnation = incarnation
        self.endpoint = ""
        self._security = security
        self._insecure = insecure
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(1)
        self._router: zmq.Socket[bytes] | None = None
        self._dealers: dict[int, zmq.Socket[bytes]] = {}
        self._next_key = 1
        self._admission = Admission(security, self._context)
        self._sent = self._received = self._dropped = self._undeliverable = 0

    def bind(self, listen: str) -> str:
        """Listen on a zmq endpoint; returns the address for peers: with the port that was taken, and the name of the
        own key, if there is one. ``ConfigError`` for an endpoint that is not allowed."""
        self._check_address(listen, "listen on")
        socket = self._make_socket(zmq.ROUTER)
        self._admission.secure_listening(socket)
        socket.set(zmq.ROUTER_MANDATORY, 1)
        socket.set(zmq.ROUTER_HANDOVER, 1)  # a peer that reconnects is heard before its old connection is found dead
        try:
            socket.bind(listen)
        except zmq.ZMQError as exc:
            self._admission.forget_listening()
            socket.close(0)
            raise ConfigError(f"control channel cannot listen on {listen}: {exc}") from exc
        self._router = socket
        bound = socket.get(zmq.LAST_ENDPOINT)
        assert isinstance(bound, bytes)
        self.endpoint = str(self._admission.listening_at(bound.rstrip(b"\0").decode()))
        return self.endpoint

    def connect(self, to: str) -> Route:
        """A new connection to a P at the address that its ``bind`` returned; what is sent before it stands waits for
        it. One that keys do not allow is told by ``take_refused``. ``ConfigError`` for a bad endpoint.

        Not ``zmq.IMMEDIATE``: a connection that ends would take along what it brought and was not read yet, so the last
        word of a P that ends, and why a transfer failed, would hang on how soon this thread is scheduled.
        """
        address = PeerAddress.parse(to)
        self._check_address(address.endpoint, "connect to")
        socket = self._make_socket(zmq.DEALER)
        key = self._next_key
        self._next_key += 1
        self._admission.secure_dialling(socket, key, address)
        try:
            socket.connect(address.endpoint)
        except zmq.ZMQError as exc:
            self._admission.forget_dialling(key)
            socket.close(0)
            raise ConfigError(f"control channel cannot connect to {address.endpoint!r}: {exc}") from exc
        self._dealers[key] = socket
        return Route(key=key, incoming=False)

    def disconnect(self, route: Route) -> None:
        """End a connection made by ``connect``; harmless for one that has ended."""
        socket = self._dealers.pop(route.key, None) if not route.incoming else None
        if socket is not None:
            self._admission.forget_dialling(route.key)
            socket.close(0)

    def send(self, route: Route, envelope: Envelope, body: Body) -> None:
        """Hand a message to zmq, or count it as undeliverable."""
        frames = encode(envelope, body)
        socket = self._router if route.incoming else self._dealers.get(route.key)
        if socket is None:
            self._undeliverable += 1
            return
        prefix = (_IDENTITY.pack(route.key),) if route.incoming else ()
        try:
            socket.send_multipart((*prefix, *frames), zmq.DONTWAIT)
        except zmq.ZMQError as exc:
            if exc.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise TransportError(f"control channel failed: {exc}") from exc
            self._undeliverable += 1
            return
        self._sent += 1

    def receive(self, ready: Container[object] | None = None) -> Iterator[Received]:
        """What has come, a bounded number at a time; what cannot be read is counted and dropped.

        ``ready``: a poller's answer, of whose sockets alone something is read; None = of all. Of another protocol
        version's messages only the envelope is given, so that the peer can be told. Peers that come in are let in, or
        not, at the same time.
        """
        self._admission.attend(ready)
        if self._router is not None and (ready is None or self._router in ready):
            yield from self._receive_from(self._router, None)
        for key, socket in list(self._dealers.items()):
            if not socket.closed and (ready is None or socket in ready):
                yield from self._receive_from(socket, Route(key=key, incoming=False))

    def take_refused(self) -> list[Refused]:
        """Connections that keys have kept from standing since the last call, as far as ``receive`` has seen."""
        return self._admission.take_refused()

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """For the owner's poller; changes with every ``bind``, ``connect`` and ``disconnect``."""
        return [*self._carriers(), *self._admission.sockets()]

    def statistics(self) -> ChannelStatistics:
        return ChannelStatistics(
            sent=self._sent,
            received=self._received,
            dropped=self._dropped,
            undeliverable=self._undeliverable,
            refused=self._admission.num_refused,
        )

    def drop(self, reason: str) -> None:
        """Count and log a message that could be read but must not be obeyed."""
        self._dropped += 1
        _LOG.warning("control message dropped: %s", reason)

    def close(self) -> None:
        """Close every socket, once what was sent has left or a moment has passed. Idempotent."""
        self._admission.close()
        for socket in self._carriers():
            socket.close(_CLOSING_LINGER_MS)
        self._router = None
        self._dealers.clear()
        self._context.term()

    def _carriers(self) -> "list[zmq.Socket[bytes]]":
        return [*([self._router] if self._router else []), *self._dealers.values()]

    def _receive_from(self, socket: "zmq.Socket[bytes]", route: Route | None) -> Iterator[Received]:
        for _ in range(_RECEIVE_AT_ONCE):
            if socket.closed:
                return
            try:
                frames = socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                yield self._read(frames, route)
            except ProtocolError as exc:
                self.drop(str(exc))
            if socket.closed or not _has_more(socket):
                return

    def _read(self, frames: list[bytes], route: Route | None) -> Received:
        identity: int | None = None
        if route is None:
            if len(frames[0]) != _IDENTITY.size:
                raise ProtocolError("sender without an incarnation")
            (identity,) = _IDENTITY.unpack(frames[0])
            route, frames = Route(key=identity, incoming=True), frames[1:]
        if len(frames) != 2:
            raise ProtocolError(f"{len(frames)} frames instead of an envelope and a body")
        envelope = decode_envelope(frames[0])
        if identity is not None and envelope.sender != identity:
            raise ProtocolError(f"envelope of {envelope.sender:016x} from connection {identity:016x}")
        if envelope.version != PROTOCOL_VERSION:
            self.drop(f"peer speaks protocol {envelope.version}, this worker speaks {PROTOCOL_VERSION}")
            return Received(route=route, envelope=envelope, body=OtherVersion(envelope.version))
        received = Received(route=route, envelope=envelope, body=decode_body(envelope, frames[1]))
        self._received += 1
        return received

    def _make_socket(self, kind: int) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.set(zmq.IDENTITY, _IDENTITY.pack(self.incarnation))
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.MAXMSGSIZE, _HARD_LIMIT_BYTES)
        socket.set(zmq.RECONNECT_IVL, 50)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        socket.set(zmq.HEARTBEAT_IVL, 2000)
        socket.set(zmq.HEARTBEAT_TIMEOUT, 6000)
        return socket

    def _check_address(self, endpoint: str, verb: str) -> None:
        if self._security.authenticated or self._insecure or is_loopback(endpoint):
            return
        raise ConfigError(
            f"will not {verb} {endpoint}: without keys control messages are not authenticated, so only loopback is "
            "allowed; give --control-keys (see pdkv keys new), use tcp://127.0.0.1:PORT, or spell out --insecure on a "
            "network that you trust"
        )


def _has_more(socket: "zmq.Socket[bytes]") -> bool:
    """Cheaper than to be told by an error that there is nothing."""
    events = socket.get(zmq.EVENTS)
    assert isinstance(events, int)
    return bool(events & zmq.POLLIN)


def is_loopback(endpoint: str) -> bool:
    """Whether a zmq endpoint stays on this host: ipc, inproc, or tcp on a loopback address (given as a number)."""
    scheme, _, rest = endpoint.partition("://")
    if scheme in ("ipc", "inproc"):
        return True
    host = rest.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
