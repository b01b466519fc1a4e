"""Who may speak on a control channel: security of its sockets, and word of every peer that keys have kept out."""

import logging
import time
from collections.abc import Container
from typing import Protocol

import msgspec
import zmq

from pdkv.errors import KeyRefusal
from pdkv.wire.curve import AdmissionDesk
from pdkv.wire.handshakes import DialWatch, HandshakeWatch

_LOG = logging.getLogger("pdkv.wire.admission")
_LOG_EVERY_S = 10.0
"""Of one kind: whoever is refused tries again many times a second."""


class ChannelSecurity(Protocol):
    """How sockets are authenticated and encrypted before they bind or connect."""

    authenticated: bool
    fingerprint: str
    """Of the own key; empty without keys."""
    accepted: tuple[str, ...]
    """Fingerprints of the keys that peers may have, the own one first."""

    def accepts(self, fingerprint: str) -> bool:
        """Whether a peer may be known by this key, or by none ("")."""

    def open_desk(self, context: "zmq.Context[zmq.Socket[bytes]]") -> AdmissionDesk | None:
        """Who judges peers that come in; None where all may."""

    def secure_server(self, socket: "zmq.Socket[bytes]") -> None: ...

    def secure_client(self, socket: "zmq.Socket[bytes]", fingerprint: str) -> None:
        """``fingerprint``: of the key that the peer's address names; empty if it names none."""


class NoSecurity:
    """Plain text and no keys: allowed on loopback only, unless ``insecure`` is spelled out."""

    authenticated = False
    fingerprint = ""
    accepted: tuple[str, ...] = ()

    def accepts(self, fingerprint: str) -> bool:
        return not fingerprint

    def open_desk(self, context: "zmq.Context[zmq.Socket[bytes]]") -> None:  # noqa: ARG002
        return None

    def secure_server(self, socket: "zmq.Socket[bytes]") -> None:
        """Nothing to set."""

    def secure_client(self, socket: "zmq.Socket[bytes]", fingerprint: str) -> None:
        """Nothing to set."""


class Refused(msgspec.Struct, frozen=True):
    """A connection that did not come about because of keys, as far as this side can tell."""

    reason: KeyRefusal
    message: str
    """What is wrong, and how to mend it."""
    dealer: int | None
    """The route's key of a connection that was dialled, and will not stand any more; None for one that came in."""


class PeerAddress(msgspec.Struct, frozen=True):
    """Where a P is to be dialled, and by which key it is known there: ``tcp://HOST:PORT#0123456789abcdef``."""

    endpoint: str
    fingerprint: str
    """Empty where the address names no key."""

    @classmethod
    def parse(cls, text: str) -> "PeerAddress":
        endpoint, _, fingerprint = text.partition("#")
        return cls(endpoint, fingerprint)

    def __str__(self) -> str:
        return f"{self.endpoint}#{self.fingerprint}" if self.fingerprint else self.endpoint


class Admission:
    """Secures and watches the sockets of one channel. Owned by the channel, in its thread; nothing here blocks."""

    def __init__(self, security: ChannelSecurity, context: "zmq.Context[zmq.Socket[bytes]]") -> None:
        self.num_refused = 0
        self._security = security
        self._context = context
        self._desk: AdmissionDesk | None = None
        self._listening: tuple[HandshakeWatch, PeerAddress] | None = None
        self._dialling: dict[int, tuple[DialWatch, PeerAddress]] = {}
        self._refused: list[Refused] = []
        self._logged: dict[KeyRefusal, tuple[float, int]] = {}
        """Of each kind: when a line was written last, and how many were not since."""

    def secure_listening(self, socket: "zmq.Socket[bytes]") -> None:
        """Before ``socket`` binds; at most once, until ``close``."""
        if self._desk is None:
            self._desk = self._security.open_desk(self._context)
        self._security.secure_server(socket)
        watch = HandshakeWatch(socket, has_keys=self._security.authenticated)
        self._listening = (watch, PeerAddress("", self._security.fingerprint))

    def listening_at(self, endpoint: str) -> PeerAddress:
        """Where ``socket`` has bound; returns the address for peers."""
        assert self._listening is not None, "secured first"
        watch, unnamed = self._listening
        self._listening = (watch, PeerAddress(endpoint, unnamed.fingerprint))
        return self._listening[1]

    def secure_dialling(self, socket: "zmq.Socket[bytes]", dealer: int, address: PeerAddress) -> None:
        """Before ``socket`` connects."""
        self._security.secure_client(socket, address.fingerprint)
        watch = DialWatch(socket, has_keys=self._security.authenticated, foreseen=self._foresee(address))
        self._dialling[dealer] = (watch, address)

    def forget_listening(self) -> None:
        """Before the socket that listens is closed; harmless when there is none."""
        if self._listening is not None:
            self._listening[0].close()
        self._listening = None

    def forget_dialling(self, dealer: int) -> None:
        """Before the socket is closed; harmless for one that is not known."""
        found = self._dialling.pop(dealer, None)
        if found is not None:
            found[0].close()

    def sockets(self) -> "list[zmq.Socket[bytes]]":
        """For the owner's poller, beside those that carry messages."""
        watches = [watch for watch, _ in (*([self._listening] if self._listening else []), *self._dialling.values())]
        return [*([self._desk.socket] if self._desk else []), *(watch.monitor for watch in watches)]

    def attend(self, ready: Container[object] | None) -> None:
        """Judge who has come in, and note what became of handshakes. ``ready``: as for ``Channel.receive``."""
        if self._desk is not None and (ready is None or self._desk.socket in ready):
            for arrival in self._desk.attend():
                told = f"a peer from {arrival.address} {_unknown(arrival.fingerprint)}"
                self._note(KeyRefusal.UNKNOWN_KEY, told, None)
        if self._listening is not None and (ready is None or self._listening[0].monitor in ready):
            watch, address = self._listening
            for reason in watch.refusals():
                self._note(reason, _told_listening(reason, address), None)
        for dealer, (dial, address) in list(self._dialling.items()):
            if ready is None or dial.monitor in ready:
                for reason in dial.refusals():
                    self._note(reason, _told_dialling(reason, address, self._security.fingerprint), dealer)

    def take_refused(self) -> list[Refused]:
        """Since the last call."""
        taken, self._refused = self._refused, []
        return taken

    def close(self) -> None:
        """Before the channel's sockets and context are closed. Idempotent."""
        self.forget_listening()
        for dealer in list(self._dialling):
            self.forget_dialling(dealer)
        if self._desk is not None:
            self._desk.close()
        self._desk = None

    def _foresee(self, address: PeerAddress) -> KeyRefusal | None:
        """Why a handshake with who is at ``address`` must fail. It is tried all the same, so that both sides see it."""
        if self._security.accepts(address.fingerprint):
            return None
        if not self._security.authenticated:
            return KeyRefusal.WITHOUT_KEYS
        return KeyRefusal.UNKNOWN_KEY if address.fingerprint else KeyRefusal.PEER_WITHOUT_KEYS

    def _note(self, reason: KeyRefusal, message: str, dealer: int | None) -> None:
        self.num_refused += 1
        self._refused.append(Refused(reason, message, dealer))
        at = time.monotonic()
        logged_at, silent = self._logged.get(reason, (at - _LOG_EVERY_S, 0))
        if at - logged_at < _LOG_EVERY_S:
            self._logged[reason] = (logged_at, silent + 1)
            return
        self._logged[reason] = (at, 0)
        _LOG.warning("control channel refused: %s%s", message, f" ({silent} more like it)" if silent else "")


def _accept(key: str, worker: str) -> str:
    return (
        f"put {key} as a *.public file into {worker}'s --control-keys folder and restart it, or give both workers the "
        "same keys"
    )


def _unknown(fingerprint: str) -> str:
    return f"holds key {fingerprint}, which this worker does not accept: {_accept('that public key', 'this worker')}"


def _told_listening(reason: KeyRefusal, own: PeerAddress) -> str:
    at = f"at {own.endpoint}"
    match reason:
        case KeyRefusal.PEER_WITHOUT_KEYS:
            return f"a peer came without keys {at}, and this worker speaks only with: start it with --control-keys too"
        case KeyRefusal.WITHOUT_KEYS:
            return f"a peer came with keys {at}, and this worker has none: start this worker with --control-keys too"
        case KeyRefusal.OTHER_KEY:
            held = f"and this worker's is {own.fingerprint}"
            return f"a peer {at} expects another key, {held}: {_accept('that public key', 'the peer')}"
        case _:
            return (
                f"a connection {at} broke off in the handshake, as where keys do not fit; its other end's log says "
                "more, if that is a worker: port scans and health checks over TCP do so too"
            )


def _told_dialling(reason: KeyRefusal, peer: PeerAddress, own: str) -> str:
    at = f"peer at {peer.endpoint}"
    match reason:
        case KeyRefusal.REFUSED_BY_PEER:
            return f"{at} refused our key {own}: {_accept('its public key', 'the peer')}"
        case KeyRefusal.PEER_WITHOUT_KEYS:
            return f"{at} speaks without keys, and this worker only with: start the peer with --control-keys too"
        case KeyRefusal.WITHOUT_KEYS:
            return f"{at} speaks only with keys, and this worker has none: start this worker with --control-keys too"
        case KeyRefusal.UNKNOWN_KEY:
            return f"{at} {_unknown(peer.fingerprint)}"
        case _:
            return (
                f"{at} closes the connection in the handshake, as one does that no longer holds the key "
                f"{peer.fingerprint or own} by which it is known: compare `pdkv keys show` of both workers"
            )
