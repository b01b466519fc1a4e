"""Frames: what goes in comes out, what breaks the schema is refused in its phase."""

import contextlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdkv.errors import FailureCode, ProtocolError
from pdkv.schema import Incarnation, TransferId, TransportAddress, VerifyPages
from pdkv.wire import messages as m
from tests.layouts import make_layout, make_manifest

TRANSFER = TransferId(bytes(range(16)))
OFFER = m.RankOffer(make_manifest(make_layout(num_layers=2)), TransportAddress("ucx", b"\x00\x01", ()))
BODIES = [
    m.Hello("d", (OFFER,)),
    m.Welcome("p", (OFFER,)),
    m.Reject(FailureCode.MANIFEST, "no"),
    m.Gone(7),
    m.Acquire(3.5, VerifyPages.SAMPLE, 2),
    m.Renew(3.5),
    m.Release(),
    m.Cancel(FailureCode.CANCELLED, ""),
    m.Granted((1, 2, 3), 300, 128),
    m.Refused(FailureCode.NO_CAPACITY, "full"),
    m.Watermark((512,)),
    m.Digests(3, 5, (b"\x00\xff" * 16, b"")),
    m.Done(11, -0.25, b"\x00\xff"),
    m.Failed(FailureCode.INTERNAL, "x"),
    m.Ack(9),
]


@pytest.mark.parametrize("body", BODIES, ids=lambda b: type(b).__name__)
def test_every_message_survives_the_wire(body: m.Body) -> None:
    envelope = m.make_envelope(Incarnation(2**64 - 1), Incarnation(2), TRANSFER, 5, "digest")
    frames = m.encode(envelope, body)
    read = m.decode_envelope(frames[0])
    assert read == envelope
    assert m.decode_body(read, frames[1]) == body


def test_every_kind_is_covered_above() -> None:
    assert {type(b) for b in BODIES} == set(m.Body.__args__)


@pytest.mark.parametrize("noise", [b"\x81\xa3\x00\x00\x80", b"\x81\xa4type\xa3\x00\x00\x80", b"\x91" * 5000])
def test_text_that_is_none_and_bottomless_nesting_are_protocol_errors(noise: bytes) -> None:
    envelope = m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5)
    with pytest.raises(ProtocolError):
        m.decode_envelope(noise)
    with pytest.raises(ProtocolError):
        m.decode_body(envelope, noise)


@given(st.binary(max_size=200), st.binary(max_size=200))
def test_noise_is_a_protocol_error_and_nothing_else(first: bytes, second: bytes) -> None:
    envelope = m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5)
    with contextlib.suppress(ProtocolError):
        m.decode_envelope(first)
    with pytest.raises(ProtocolError):
        m.decode_body(envelope, b"\xc1" + second)


def test_what_travels_with_the_first_token_is_bounded() -> None:
    envelope = m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5)
    largest = m.Done(1, 0.0, bytes(m.MAX_ATTACHMENT_BYTES))
    assert m.decode_body(envelope, m.encode(envelope, largest)[1]) == largest
    with pytest.raises(ProtocolError):
        m.decode_body(envelope, m.encode(envelope, m.Done(1, 0.0, bytes(m.MAX_ATTACHMENT_BYTES + 1)))[1])


def test_an_envelope_of_another_version_is_read_but_its_body_is_not() -> None:
    envelope = msgspec.structs.replace(m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5), version=99)
    read = m.decode_envelope(msgspec.msgpack.encode(envelope))
    assert read.version == 99
    with pytest.raises(ProtocolError, match="protocol 99"):
        m.decode_body(read, msgspec.msgpack.encode(m.Release()))


@pytest.mark.parametrize(
    "raw",
    [
        {"type": "acquire", "ttl_s": -1.0},
        {"type": "acquire", "ttl_s": 1e9},
        {"type": "acquire", "ttl_s": "1"},
        {"type": "acquire"},
        {"type": "acquire", "ttl_s": 1.0, "extra": 1},
        {"type": "nonsense"},
        {"type": "granted", "pages": [-1], "num_tokens": 1, "cached_tokens": 0},
        {"type": "failed", "code": "made_up", "message": ""},
        {"type": "failed", "code": "internal", "message": "x" * 100_000},
    ],
)
def test_bodies_that_break_the_schema_are_refused(raw: object) -> None:
    envelope = m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5)
    with pytest.raises(ProtocolError, match="body cannot be read"):
        m.decode_body(envelope, msgspec.msgpack.encode(raw))


def test_sizes_are_limited() -> None:
    envelope = m.make_envelope(Incarnation(1), Incarnation(2), TRANSFER, 5)
    with pytest.raises(ProtocolError, match="at most"):
        m.decode_envelope(bytes(m.MAX_ENVELOPE_BYTES + 1))
    with pytest.raises(ProtocolError, match="at most"):
        m.decode_body(envelope, bytes(m.MAX_BODY_BYTES + 1))
    with pytest.raises(ProtocolError, match="transfer id of 3 bytes"):
        m.decode_envelope(msgspec.msgpack.encode(msgspec.structs.replace(envelope, transfer=b"abc")))
