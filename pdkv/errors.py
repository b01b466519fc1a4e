"""The error tree. Every error that leaves a pdkv layer is one of these.

    PdkvError
    ├── ConfigError            bad flag, environment variable, YAML key or value (exit 2)
    ├── ModelError             checkpoint or model config that cannot be served
    │   └── CheckpointError    missing, extra or mis-shaped tensors, all listed
    ├── RequestError           a request that can never be served as asked (HTTP 400 and kin)
    ├── CapacityError          no room now or ever: pages, queue (HTTP 429, 503)
    ├── RankLostError          a rank of this worker died or did not answer; its ranks can only end
    ├── TransferError          a transfer that ended badly; carries a FailureCode
    ├── HandshakeError         two workers that must not talk: manifests or keys do not fit, probe failed
    ├── TransportError         a transport that cannot start, register or connect
    └── ProtocolError          a control message that breaks the protocol

Foreign errors are mapped to these once, at the edge that meets them. A failed read is a ``Completion``, not an
exception; a broken invariant is an ``assert``.
"""

from enum import StrEnum


class FailureCode(StrEnum):
    """Why a transfer or request ended without an answer. Travels on the wire and labels metrics: never rename one."""

    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    DIGEST_MISMATCH = "digest_mismatch"
    INTERNAL = "internal"
    KEYS = "keys"
    LEASE_EXPIRED = "lease_expired"
    MANIFEST = "manifest"
    NO_CAPACITY = "no_capacity"
    PEER_LOST = "peer_lost"
    PROBE = "probe"
    READ_FAILED = "read_failed"
    SHUTDOWN = "shutdown"
    UNKNOWN_TRANSFER = "unknown_transfer"


class KeyRefusal(StrEnum):
    """Why a control channel between two workers did not come about. Labels metrics: never rename one."""

    BROKEN_OFF = "broken_off"
    """A connection ended amid the handshake and did not say why; port scans and health checks over TCP do so too."""
    OTHER_KEY = "other_key"
    """Who connects expects another key than the one that the listening side holds."""
    PEER_WITHOUT_KEYS = "peer_without_keys"
    REFUSED_BY_PEER = "refused_by_peer"
    """The listening side does not accept our key."""
    UNKNOWN_KEY = "unknown_key"
    """We do not accept the peer's."""
    WITHOUT_KEYS = "without_keys"
    """The peer has keys, and we have none."""


class PdkvError(Exception):
    """Root of the tree. ``exit_code`` is what the command line ends with when nothing catches it."""

    exit_code = 1


class ConfigError(PdkvError, ValueError):
    exit_code = 2


class ModelError(PdkvError, ValueError):
    exit_code = 2


class CheckpointError(ModelError):
    pass


class RequestError(PdkvError, ValueError):
    """A request refused for what it asks. ``param`` names the field, ``status`` is the HTTP status."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400) -> None:
        super().__init__(message)
        self.param = param
        self.code = code
        self.status = status


class CapacityError(PdkvError):
    pass


class RankLostError(PdkvError):
    pass


class TransferError(PdkvError):
    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class HandshakeError(PdkvError):
    exit_code = 6

    def __init__(self, code: FailureCode, message: str) -> None:
        super().__init__(message)
        self.code = code


class TransportError(PdkvError):
    pass


class ProtocolError(PdkvError):
    pass
