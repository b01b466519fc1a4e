"""What became of zmq's own handshakes, from its monitors: which of them failed because two workers' keys do not fit.

libzmq tells each side what that side has seen, no more. Whoever notices first that only one of the two has keys closes
the connection, and to the other it merely broke off. So a side that connects goes by what the address says of the
peer's key, too.
"""

import itertools

import zmq
from zmq.utils.monitor import parse_monitor_message

from pdkv.errors import KeyRefusal

_FAILURES = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
_READ_AT_ONCE = 64
_numbers = itertools.count()
_BREAKS = 3
"""Handshakes that broke off in a row mean that the peer closes them; one alone may be a peer that ends."""


class HandshakeWatch:
    """The monitor of one socket. Owned by the socket's owner, who polls ``monitor``, and closes this first."""

    events: int = _FAILURES
    """What wakes the owner."""

    def __init__(self, socket: "zmq.Socket[bytes]", *, has_keys: bool) -> None:
        self._socket = socket
        self._has_keys = has_keys
        # Not pyzmq's own address for it, which is made of the socket's descriptor and may still be taken for a moment
        # after another monitor of it has been closed.
        address = f"inproc://pdkv.handshakes.{next(_numbers)}"
        socket.monitor(address, self.events)
        self.monitor: zmq.Socket[bytes] = socket.context.socket(zmq.PAIR)
        self.monitor.set(zmq.LINGER, 0)
        self.monitor.connect(address)

    def refusals(self) -> list[KeyRefusal]:
        """Handshakes that have failed since the last call, as far as keys can be why."""
        found = []
        for _ in range(_READ_AT_ONCE):
            try:
                frames = self.monitor.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            told = parse_monitor_message(frames)
            refusal = self._judge(zmq.Event(told["event"]), told["value"])
            if refusal is not None:
                found.append(refusal)
        return found

    def close(self) -> None:
        self._socket.disable_monitor()
        self.monitor.close(0)

    def _judge(self, event: zmq.Event, value: int) -> KeyRefusal | None:
        """Of a socket that listens. Keys that are not accepted are told by the desk, which knows whose they are."""
        if event is zmq.Event.HANDSHAKE_FAILED_NO_DETAIL:
            return KeyRefusal.BROKEN_OFF
        if event is zmq.Event.HANDSHAKE_FAILED_PROTOCOL:
            return self._mismatch(value)
        return None

    def _mismatch(self, value: int) -> KeyRefusal:
        if value == zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH:
            return KeyRefusal.PEER_WITHOUT_KEYS if self._has_keys else KeyRefusal.WITHOUT_KEYS
        if value in (zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC, zmq.PROTOCOL_ERROR_ZMTP_KEY_EXCHANGE):
            return KeyRefusal.OTHER_KEY
        return KeyRefusal.BROKEN_OFF


class DialWatch(HandshakeWatch):
    """Of a socket that connects to one address."""

    events = _FAILURES | zmq.EVENT_HANDSHAKE_SUCCEEDED

    def __init__(self, socket: "zmq.Socket[bytes]", *, has_keys: bool, foreseen: KeyRefusal | None) -> None:
        """``foreseen``: why the handshake must fail, going by the address; None if it need not."""
        super().__init__(socket, has_keys=has_keys)
        self._foreseen = foreseen
        self._breaks = 0

    def _judge(self, event: zmq.Event, value: int) -> KeyRefusal | None:
        if event is zmq.Event.HANDSHAKE_SUCCEEDED:
            self._breaks = 0
            return None
        if event is zmq.Event.HANDSHAKE_FAILED_AUTH:
            return KeyRefusal.REFUSED_BY_PEER
        self._breaks += 1
        if event is zmq.Event.HANDSHAKE_FAILED_PROTOCOL and (found := self._mismatch(value)) in (
            KeyRefusal.PEER_WITHOUT_KEYS,
            KeyRefusal.WITHOUT_KEYS,
        ):
            return found
        if self._foreseen is not None:
            return self._foreseen
        return KeyRefusal.OTHER_KEY if self._has_keys and self._breaks >= _BREAKS else None
