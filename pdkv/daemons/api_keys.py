"""Keys by which a router's clients are let in: a file with one on each line, read again when it changes.

A file and no flag or variable of its own, for those stand in lists of processes and in dumps; it fits a Secret of
Kubernetes, whose volume replaces it when the Secret changes.
"""

import hashlib
from pathlib import Path

import structlog

from pdkv.daemons.file_state import file_state
from pdkv.errors import ConfigError

_SHORTEST = 16
_SCHEME = "bearer"
_log = structlog.get_logger(__name__)


class ApiKeys:
    """The keys of one file. Belongs to the event loop's thread."""

    def __init__(self, file: Path) -> None:
        """Raises ConfigError where the file cannot be read, or holds no key or a bad one."""
        self._file = file
        self._state = file_state(file)
        self._digests = _read(file)

    def admits(self, authorization: str) -> bool:
        """Whether this value of the header of that name holds one of the keys: "Bearer KEY".

        A file that has become unreadable or bad is told of in the log, once, and the keys before it stay.
        """
        self._look_again()
        scheme, _, key = authorization.partition(" ")
        # Whoever measures how long a look-up takes learns about a digest, which tells nothing of any key.
        return scheme.lower() == _SCHEME and _digest(key.strip()) in self._digests

    def _look_again(self) -> None:
        state = file_state(self._file)
        if state == self._state:
            return
        self._state = state
        try:
            self._digests = _read(self._file)
        except ConfigError as exc:
            _log.warning("api keys not read", error=str(exc), kept=len(self._digests))
        else:
            _log.info("api keys read", file=str(self._file), keys=len(self._digests))


def _read(file: Path) -> frozenset[bytes]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{file} is no text of API keys, one a line") from exc
    except OSError as exc:
        raise ConfigError(f"cannot read the API keys of {file}: {exc.strerror}") from exc
    keys = {nth: line.strip() for nth, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")}
    for nth, key in keys.items():
        _check(key, f"{file}, line {nth}")
    if not keys:
        raise ConfigError(f"{file} holds no key: it takes one a line, `openssl rand -hex 24` makes one")
    return frozenset(map(_digest, keys.values()))


def _check(key: str, where: str) -> None:
    """Its text is not told: errors are logged."""
    if len(key.split()) > 1:
        raise ConfigError(f"{where} holds more than one word; a key is one word")
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"{where} holds more than ASCII, which clients cannot send")
    if len(key) < _SHORTEST:
        raise ConfigError(f"{where} is too short to be a key: it needs at least {_SHORTEST} characters")


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()
