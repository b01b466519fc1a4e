"""The certificate that a router's clients see: two files of PEM, read again when they change.

Who renews a certificate (cert-manager, an ACME client) replaces files; whoever connects from then on sees the new one,
and connections that are open keep the old.
"""

import ssl
from pathlib import Path

import structlog

from pdkv.daemons.file_state import FileState, file_state
from pdkv.errors import ConfigError

_log = structlog.get_logger(__name__)


class Certificate:
    """A server's certificate, with its chain, and its key. Belongs to the event loop's thread."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises ConfigError where a file cannot be read, holds none, or the key is another certificate's."""
        self._chain, self._key = chain, key
        self._states = self._look()
        self._newest = _read(chain, key)
        self.context = self._newest
        """For a listening socket, as long as it listens."""
        self.context.sni_callback = self._hand_over

    def _hand_over(self, handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """At the beginning of every handshake, whether it names a host or not."""
        self._look_again()
        if self._newest is not self.context:
            handshake.context = self._newest

    def _look_again(self) -> None:
        """Files that have become unreadable or bad are told of in the log, once, and what was read before stays."""
        states = self._look()
        if states == self._states:
            return
        self._states = states
        try:
            self._newest = _read(self._chain, self._key)
        except ConfigError as exc:
            _log.warning("certificate not read", error=str(exc))
        else:
            _log.info("certificate read", file=str(self._chain))

    def _look(self) -> tuple[FileState | None, FileState | None]:
        return file_state(self._chain), file_state(self._key)


def _read(chain: Path, key: Path) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)  # TLS 1.2 or later
    context.set_alpn_protocols(["http/1.1"])
    for file in (chain, key):
        try:
            file.read_bytes()
        except OSError as exc:  # of which load_cert_chain does not say which file it means
            raise ConfigError(f"cannot read {file}: {exc.strerror}") from exc
    try:
        context.load_cert_chain(chain, key, password=_refuse)
    except OSError as exc:  # ssl.SSLError is one
        reason = getattr(exc, "reason", None) or exc
        if reason == "KEY_VALUES_MISMATCH":
            raise ConfigError(f"the key in {key} is not that of the certificate in {chain}") from exc
        raise ConfigError(
            f"{chain} and {key} are no certificate and key that TLS can use ({reason}); both are PEM, the server's own "
            "certificate first and those that signed it behind it"
        ) from exc
    return context


def _refuse() -> str:
    """Nobody is there to be asked for it."""
    raise ConfigError("the key is encrypted: decrypt it (openssl pkey -in KEY -out PLAIN) and guard it by its mode")
