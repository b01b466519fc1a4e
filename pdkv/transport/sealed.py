"""Marks bytes that only the implementation that made them can take apart, so that damaged ones are told in time."""

import zlib

from pdkv.errors import TransportError

_SUM_BYTES = 4


def seal(magic: bytes, payload: bytes) -> bytes:
    """``payload`` behind a mark of who made it and a checksum. Proves nothing about who sent it."""
    return magic + zlib.crc32(payload).to_bytes(_SUM_BYTES, "little") + payload


def unseal(magic: bytes, sealed: bytes, what: str) -> bytes:
    """The payload. Raises ``TransportError`` naming ``what`` when it is not as ``seal(magic, ...)`` left it."""
    head, payload = sealed[: len(magic) + _SUM_BYTES], sealed[len(magic) + _SUM_BYTES :]
    if head != magic + zlib.crc32(payload).to_bytes(_SUM_BYTES, "little"):
        raise TransportError(
            f"{what} was not made by a {magic.decode()} transport of this version, or was damaged on its way"
        )
    return payload
