"""The certificate that a router's clients see: two files of PEM, read again when they change.

Who renews a certificate (cert-manager, an ACME client) replaces files; whoever connects from then on sees the new one,
and connections that are open keep the old.
"""

import datetime
import ssl
import time
from pathlib import Path
from typing import Any, NamedTuple

import structlog

from pdkv.daemons.file_state import FileState, file_state
from pdkv.errors import ConfigError

_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, for which the standard library has no name."""
_log = structlog.get_logger(__name__)


class _Read(NamedTuple):
    """What the files held."""

    context: ssl.SSLContext
    ends_at: float  # seconds since 1970


class Certificate:
    """A server's certificate, with its chain, and its key. Belongs to the event loop's thread."""

    def __init__(self, chain: Path, key: Path) -> None:
        """Raises ConfigError where a file cannot be read, holds none, or the key is another certificate's. One whose
        time has come is told of in the log."""
        self._chain, self._key = chain, key
        self._states = self._look()
        self._newest = self._read()
        self.context = self._newest.context
        """For a listening socket, as long as it listens."""
        self.context.sni_callback = self._hand_over

    def ends_at(self) -> float:
        """Of the newest, in seconds since 1970."""
        self._look_again()
        return self._newest.ends_at

    def _hand_over(self, handshake: ssl.SSLObject, _name: str | None, _context: ssl.SSLContext) -> None:
        """At the beginning of every handshake, whether it names a host or not."""
        self._look_again()
        if self._newest.context is not self.context:
            handshake.context = self._newest.context

    def _look_again(self) -> None:
        """Files that have become unreadable or bad are told of in the log, once, and what was read before stays."""
        states = self._look()
        if states == self._states:
            return
        self._states = states
        try:
            self._newest = self._read()
        except ConfigError as exc:
            _log.warning("certificate not read", error=str(exc))

    def _look(self) -> tuple[FileState | None, FileState | None]:
        return file_state(self._chain), file_state(self._key)

    def _read(self) -> _Read:
        context = _context(self._chain, self._key)
        ends_at = _ends_at(context, self._chain)
        until = datetime.datetime.fromtimestamp(ends_at, datetime.UTC).isoformat()
        if ends_at > time.time():
            _log.info("certificate read", file=str(self._chain), until=until)
        else:
            _log.warning("certificate has ended, and clients will refuse it", file=str(self._chain), until=until)
        return _Read(context, ends_at)


def _context(chain: Path, key: Path) -> ssl.SSLContext:
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


def _ends_at(server: ssl.SSLContext, chain: Path) -> float:
    """When the server's certificate ends: the standard library tells it only to who has verified the certificate, so by
    a client that trusts what stands in the file, whatever the date."""
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN | ssl.VerifyFlags(_NO_CHECK_TIME)
    try:
        client.load_verify_locations(chain)
        seen = shown(server, client)
    except ssl.SSLError as exc:
        raise ConfigError(f"clients refuse the certificate in {chain}: {getattr(exc, 'verify_message', exc)}") from exc
    return ssl.cert_time_to_seconds(str(seen["notAfter"]))


def shown(server: ssl.SSLContext, client: ssl.SSLContext, host: str | None = None) -> dict[str, Any]:
    """The certificate that a client is shown, as ``getpeercert`` has it, by a handshake in memory.

    Raises ssl.SSLError where either refuses the other.
    """
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    theirs = client.wrap_bio(to_client, to_server, server_hostname=host)
    ours = server.wrap_bio(to_server, to_client, server_side=True)
    waiting = [theirs, ours]
    while waiting:
        for side in tuple(waiting):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            waiting.remove(side)
    return theirs.getpeercert() or {}
