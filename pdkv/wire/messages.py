"""Control messages: an envelope that any version can read, and typed bodies that only an equal version reads.

Two frames a message. The envelope says who speaks to whom about which transfer, and carries the digest of the sender's
manifest; it is decoded first. The body is decoded only when the protocol versions agree. A Hello is answered by Welcome
or Reject; every message of a transfer is acknowledged; all are idempotent. Durations go on the wire, never points in
time.
"""

from typing import Annotated

import msgspec

from pdkv.errors import FailureCode, ProtocolError
from pdkv.schema import PROTOCOL_VERSION, Incarnation, Manifest, TransferId, TransportAddress, VerifyPages

MAX_ENVELOPE_BYTES = 1024
MAX_BODY_BYTES = 8 << 20
MAX_ATTACHMENT_BYTES = 7 << 20
MAX_DIGEST_BYTES = 7 << 20

TRANSFER_ID_BYTES = 16
NO_TRANSFER = TransferId(b"")
"""In the envelope of messages between workers that concern no single transfer."""

U64 = Annotated[int, msgspec.Meta(ge=0)]  # msgpack itself ends at 64 bits
Count = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
Duration = Annotated[float, msgspec.Meta(ge=0, le=7 * 86400)]
Text = Annotated[str, msgspec.Meta(max_length=64 << 10)]
Attachment = Annotated[bytes, msgspec.Meta(max_length=MAX_ATTACHMENT_BYTES)]
MAX_LAYER_GROUPS = 64
MAX_RANKS = 64
DigestBytes = Annotated[bytes, msgspec.Meta(max_length=MAX_DIGEST_BYTES)]
LayerGroups = Annotated[tuple[Count, ...], msgspec.Meta(min_length=1, max_length=MAX_LAYER_GROUPS)]
Id = Annotated[bytes, msgspec.Meta(max_length=TRANSFER_ID_BYTES)]


class Envelope(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    sender: U64
    addressee: U64
    """Incarnation this message is for; any other life of that worker answers with Gone."""
    transfer: Id
    seq: U64
    """Number of this *copy*: a re-sent message gets a new one, so that an acknowledgement names the copy that came."""
    digest: Annotated[str, msgspec.Meta(max_length=128)] = ""
    """Pairing digest of the sender's manifest, in Hello and Welcome."""


class RankOffer(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank of a worker: what it holds and where it is read."""

    manifest: Manifest
    address: TransportAddress


class Hello(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="hello"):
    """D introduces itself. ``name`` is stable over restarts: a new incarnation of a name ends the old one."""

    name: Text
    ranks: tuple[RankOffer, ...]


class Welcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="welcome"):
    """P's answer to a Hello whose manifest fits."""

    name: Text
    ranks: tuple[RankOffer, ...]


class Reject(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="reject"):
    """P's answer to a Hello that does not fit, naming what differs."""

    code: FailureCode
    message: Text


class Gone(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="gone"):
    """That incarnation is no more; not acknowledged. Sent by a P to whoever writes to an older life of it, and by a D
    of itself when it ends."""

    incarnation: U64


class Acquire(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="acquire"):
    """D has pages and wants the state; asks for a lease of ``ttl_s`` from receipt."""

    ttl_s: Duration
    verify: VerifyPages = VerifyPages.OFF
    """Which digests of pages D wants to compare."""
    first_block: Count = 0
    """The first block that D reads, and so the first that digests are wanted of."""


class Renew(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="renew"):
    ttl_s: Duration


class Release(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="release"):
    """D has everything and reads no more."""


class Cancel(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="cancel"):
    """D gave up and reads no more."""

    code: FailureCode
    message: Text


class Granted(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="granted"):
    """P's pages of the request, in block order."""

    pages: tuple[Count, ...]
    num_tokens: Count
    cached_tokens: Count
    """Leading tokens whose state is there already."""
    layer_groups: LayerGroups = (0,)
    """The first layer of each layer group, ascending from 0; the last group has all layers that follow."""


class Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="refused"):
    """P will not serve this transfer and holds nothing for it."""

    code: FailureCode
    message: Text


class Watermark(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="watermark"):
    """Tokens whose state is complete, one number for each layer group that Granted named; monotone."""

    tokens: LayerGroups


class Digests(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="digests"):
    """Digests of blocks ``[start, stop)`` as they are in P's pages, all layers of them, for an Acquire that wants some.

    Every block comes in one such message and one only, the last of them maybe behind Done.
    """

    start: Count
    stop: Count
    by_rank: Annotated[tuple[DigestBytes, ...], msgspec.Meta(min_length=1, max_length=MAX_RANKS)]
    """Of what each rank of P holds, in the order that ``pdkv.core.digests`` gives them; 16 bytes each."""


class Done(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="done"):
    """Prefill is complete: everything may be read, and this is the first generated token."""

    token: Count
    logprob: float
    attachment: Attachment = b""
    """What the request wanted besides, for instance log-probabilities of the prompt; the protocol does not look."""


class Failed(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="failed"):
    """P gave up. Its pages stay until D releases or the lease ends."""

    code: FailureCode
    message: Text


class Ack(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag="ack"):
    seq: U64


Body = (
    Hello
    | Welcome
    | Reject
    | Gone
    | Acquire
    | Renew
    | Release
    | Cancel
    | Granted
    | Refused
    | Watermark
    | Digests
    | Done
    | Failed
    | Ack
)


class OtherVersion(msgspec.Struct, frozen=True):
    """Never sent: stands for the unread body of a message whose envelope names another protocol version."""

    version: int


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for bytes that are no message: text that is not UTF-8 and bottomless nesting among them."""

_ENCODER = msgspec.msgpack.Encoder()
_ENVELOPE_DECODER = msgspec.msgpack.Decoder(Envelope)
_BODY_DECODER: msgspec.msgpack.Decoder[Body] = msgspec.msgpack.Decoder(Body)


def encode(envelope: Envelope, body: Body) -> tuple[bytes, bytes]:
    return _ENCODER.encode(envelope), _ENCODER.encode(body)


def decode_envelope(frame: bytes) -> Envelope:
    """First phase. Raises ``ProtocolError`` for anything that is not an envelope."""
    if len(frame) > MAX_ENVELOPE_BYTES:
        raise ProtocolError(f"envelope of {len(frame)} bytes; at most {MAX_ENVELOPE_BYTES} are allowed")
    try:
        envelope = _ENVELOPE_DECODER.decode(frame)
    except _UNREADABLE as exc:
        raise ProtocolError(f"envelope cannot be read: {exc}") from exc
    if envelope.transfer and len(envelope.transfer) != TRANSFER_ID_BYTES:
        raise ProtocolError(f"transfer id of {len(envelope.transfer)} bytes instead of {TRANSFER_ID_BYTES}")
    return envelope


def decode_body(envelope: Envelope, frame: bytes) -> Body:
    """Second phase. Raises ``ProtocolError`` for another protocol version or a body that breaks the schema."""
    if envelope.version != PROTOCOL_VERSION:
        raise ProtocolError(f"peer speaks protocol {envelope.version}, this worker speaks {PROTOCOL_VERSION}")
    if len(frame) > MAX_BODY_BYTES:
        raise ProtocolError(f"body of {len(frame)} bytes; at most {MAX_BODY_BYTES} are allowed")
    try:
        return _BODY_DECODER.decode(frame)
    except _UNREADABLE as exc:
        raise ProtocolError(f"body cannot be read: {exc}") from exc


def make_envelope(
    sender: Incarnation, addressee: Incarnation, transfer: TransferId, seq: int, digest: str = ""
) -> Envelope:
    return Envelope(
        version=PROTOCOL_VERSION, sender=sender, addressee=addressee, transfer=transfer, seq=seq, digest=digest
    )
