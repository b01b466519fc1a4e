"""Keys of the control channel: zmq's CURVE, and the answer to zmq's question whether a peer's key is accepted.

A worker has one key pair and accepts a set of public keys, its own always among them. Who connects proves to hold the
key that it is known by, and so does who is connected to; everything after that is encrypted.
"""

import hashlib
from typing import NoReturn

import msgspec
import zmq
from zmq.utils import z85

from pdkv.errors import ConfigError

KEY_BYTES = 32
_FINGERPRINT_BYTES = 8
_DOMAIN = b"pdkv"
_DESK_ENDPOINT = "inproc://zeromq.zap.01"
"""Where libzmq asks, by RFC 27 (ZAP)."""
_VERSION, _MECHANISM = b"1.0", b"CURVE"
_FRAMES = 7
_ATTEND_AT_ONCE = 64


class SecretKey:
    """Shown nowhere, whatever prints the things that hold it."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        assert len(value) == KEY_BYTES, f"{len(value)} bytes of key"
        self._value = value

    @classmethod
    def new(cls) -> "SecretKey":
        """From the system's source of randomness. ``ConfigError`` where libzmq has no CURVE."""
        require_curve()
        return cls(z85.decode(zmq.curve_keypair()[1]))

    def reveal(self) -> bytes:
        """For a socket, or for the file that keeps it."""
        return self._value

    def public(self) -> "PublicKey":
        return PublicKey(z85.decode(zmq.curve_public(z85.encode(self._value))))

    def __repr__(self) -> str:
        return "SecretKey(...)"

    def __reduce__(self) -> NoReturn:
        raise TypeError("a secret key does not travel")


class PublicKey(msgspec.Struct, frozen=True):
    value: bytes
    """32 bytes."""

    @property
    def fingerprint(self) -> str:
        """16 hex digits: what logs, addresses and ``describe`` call the key."""
        return hashlib.sha256(self.value).digest()[:_FINGERPRINT_BYTES].hex()


class Keys(msgspec.Struct, frozen=True):
    """What one worker holds."""

    secret: SecretKey
    own: PublicKey
    accepted: tuple[PublicKey, ...]
    """The own one first."""

    @classmethod
    def of(cls, secret: SecretKey, others: tuple[PublicKey, ...] = ()) -> "Keys":
        """``others``: public keys of peers; one that is there twice counts once."""
        own = secret.public()
        return cls(secret, own, tuple(dict.fromkeys((own, *others))))


class Arrival(msgspec.Struct, frozen=True):
    """A peer that was not let in."""

    address: str
    """IP address, as its connection came in."""
    fingerprint: str


class CurveSecurity:
    """A ``ChannelSecurity`` of mutual authentication and encryption. Holds no socket; the desk that it opens does."""

    authenticated = True

    def __init__(self, keys: Keys) -> None:
        """``ConfigError`` where libzmq has no CURVE."""
        require_curve()
        self._keys = keys
        self._by_fingerprint = {key.fingerprint: key for key in keys.accepted}
        self.fingerprint = keys.own.fingerprint
        self.accepted = tuple(self._by_fingerprint)

    def accepts(self, fingerprint: str) -> bool:
        return fingerprint in self._by_fingerprint

    def open_desk(self, context: "zmq.Context[zmq.Socket[bytes]]") -> "AdmissionDesk":
        return AdmissionDesk(context, self._keys.accepted)

    def secure_server(self, socket: "zmq.Socket[bytes]") -> None:
        socket.set(zmq.CURVE_SERVER, 1)
        socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.reveal())
        socket.set(zmq.ZAP_DOMAIN, _DOMAIN)
        socket.set(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without a desk nobody is let in, where zmq would let in everybody

    def secure_client(self, socket: "zmq.Socket[bytes]", fingerprint: str) -> None:
        """``fingerprint``: of the key that the server is known by. One that is not accepted, or none, is replaced by
        the own key: the server can then not answer, and learns of it, unless it holds that one."""
        server = self._by_fingerprint.get(fingerprint, self._keys.own)
        socket.set(zmq.CURVE_SECRETKEY, self._keys.secret.reveal())
        socket.set(zmq.CURVE_PUBLICKEY, self._keys.own.value)
        socket.set(zmq.CURVE_SERVERKEY, server.value)


class AdmissionDesk:
    """Answers libzmq, amid each handshake of a server's socket, whether a client's key is accepted.

    Without a thread of its own: the channel's owner polls ``socket`` and calls ``attend``, which does not block. A
    handshake waits for that as a message would. Owned by the channel's owner.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", accepted: tuple[PublicKey, ...]) -> None:
        self._accepted = {key.value for key in accepted}
        self.socket: zmq.Socket[bytes] = context.socket(zmq.REP)
        self.socket.set(zmq.LINGER, 0)
        self.socket.bind(_DESK_ENDPOINT)

    def attend(self) -> list[Arrival]:
        """Answer what has been asked; returns those that were turned away."""
        refused = []
        for _ in range(_ATTEND_AT_ONCE):
            try:
                frames = self.socket.recv_multipart(zmq.DONTWAIT)
            except zmq.Again:
                break
            turned_away = self._answer(frames)
            if turned_away is not None:
                refused.append(turned_away)
        return refused

    def close(self) -> None:
        """Idempotent. Handshakes that nobody has judged come to nothing."""
        self.socket.close(0)

    def _answer(self, frames: list[bytes]) -> Arrival | None:
        version, request, domain, address, _, mechanism, credentials = (frames + [b""] * _FRAMES)[:_FRAMES]
        asked = (version, domain, mechanism, len(frames), len(credentials))
        if asked != (_VERSION, _DOMAIN, _MECHANISM, _FRAMES, KEY_BYTES):
            self._reply(request, b"500", b"not a question about a CURVE key")
            return Arrival(address.decode(errors="replace"), "unreadable")
        if credentials in self._accepted:
            self._reply(request, b"200", b"accepted")
            return None
        self._reply(request, b"400", b"key not accepted")
        return Arrival(address.decode(errors="replace"), PublicKey(credentials).fingerprint)

    def _reply(self, request: bytes, status: bytes, text: bytes) -> None:
        self.socket.send_multipart((_VERSION, request, status, text, b"", b""), zmq.DONTWAIT)


def require_curve() -> None:
    """Raises ``ConfigError`` where libzmq was built without CURVE."""
    if not zmq.has("curve"):
        raise ConfigError(f"libzmq {zmq.zmq_version()} was built without CURVE: install pyzmq from its wheel")
