"""The sockets transport beyond the kit: who may read, what a host takes for a request, and where it listens."""

import contextlib
import socket
import struct

import msgspec
import pytest

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory
from pdkv.transport import sockets
from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance_memory import HiddenArray
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.sockets import STAGED, SocketOptions, SocketTransport

from .reading import ended, filled, read, span

MAGIC = b"pdkvtcp1"
GREETING = struct.Struct("<Q32s")


@pytest.fixture
def ends():
    """A target that holds 100,000 sevens, and a reader with room for as many."""
    target, reader = SocketTransport(), SocketTransport()
    source, into = filled(100_000, 7), filled(100_000, 0)
    target.register(source.memory)
    reader.register(into.memory)
    yield target, reader, into
    reader.close()
    target.close()


def inner(transport: SocketTransport):
    return msgspec.msgpack.decode(unseal(MAGIC, transport.address().address, ""), type=sockets._Address)


def changed(transport: SocketTransport, **changes):
    payload = msgspec.msgpack.encode(msgspec.structs.replace(inner(transport), **changes))
    return msgspec.structs.replace(transport.address(), address=seal(MAGIC, payload))


def received(connection: socket.socket, size: int) -> bytes:
    with connection.makefile("rb", buffering=0) as stream:
        parts = []
        while size and (part := stream.read(size)):
            parts.append(part)
            size -= len(part)
    return b"".join(parts)


@contextlib.contextmanager
def connection(target: SocketTransport):
    """A puller made by hand, past its greeting."""
    address = inner(target)
    with socket.create_connection((address.host, address.port), timeout=60) as opened:
        opened.sendall(GREETING.pack(int.from_bytes(b"pkpull01", "little"), address.token))
        greeting, memories = struct.unpack("<QQ", received(opened, 16))
        assert greeting == int.from_bytes(b"pkpull01", "little")
        assert memories == 1
        yield opened


def request(*spans: tuple[int, int, int]) -> bytes:
    return struct.pack("<Q", len(spans)) + b"".join(struct.pack("<QQQ", *span) for span in spans)


def test_a_wrong_token_reads_nothing(ends):
    target, reader, into = ends
    peer = reader.connect(changed(target, token=bytes(32)))
    completion = read(reader, peer, into, 100)
    assert completion.status is ReadStatus.FAILED
    assert "does not know us" in completion.error
    assert not into.bytes.any()


def test_a_port_where_nobody_listens_fails_the_read(ends):
    target, reader, into = ends
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, so that nobody else takes it, and not listening
        peer = reader.connect(changed(target, port=taken.getsockname()[1]))
        completion = read(reader, peer, into, 100)
    assert completion.status is ReadStatus.FAILED
    assert "Connection refused" in completion.error


def test_a_name_that_is_none_fails_the_read(ends):
    target, reader, into = ends
    peer = reader.connect(changed(target, host="no-such-host.invalid"))
    completion = read(reader, peer, into, 100)
    assert completion.status is ReadStatus.FAILED
    assert "no-such-host.invalid" in completion.error


def test_host_answers_good_requests_in_order(ends):
    target, _, _ = ends
    with connection(target) as opened:
        opened.sendall(request((0, 0, 10), (0, 99_990, 10)) + request((0, 5, 100_000 - 5)))
        assert received(opened, 100_015) == b"\7" * 100_015


@pytest.mark.parametrize(
    "bad",
    [
        request((0, 0, 100_001)),
        request((0, 100_000, 1)),
        request((0, 2**64 - 1, 2)),
        request((0, 1, 2**64 - 1)),
        request((1, 0, 1)),
        request((2**63, 0, 1)),
        request((0, 0, 0)),
        request((0, 0, 10), (0, 0, 100_001)),
        struct.pack("<Q", 0),
        struct.pack("<Q", 513),
        struct.pack("<Q", 2**64 - 1),
    ],
    ids=lambda bad: bad[:40].hex(),
)
def test_host_closes_on_requests_outside_its_memory(ends, bad: bytes):
    target, reader, into = ends
    with connection(target) as opened:
        opened.sendall(bad)
        with contextlib.suppress(ConnectionResetError):
            assert opened.recv(1) == b"", "a byte was sent for a request that is out of bounds"
    assert read(reader, reader.connect(target.address()), into, 10).status is ReadStatus.OK, "and it serves others"


def test_strangers_that_say_nothing_keep_nobody_out(ends):
    target, reader, into = ends
    address = inner(target)
    with contextlib.ExitStack() as held:
        for _ in range(40):
            held.enter_context(socket.create_connection((address.host, address.port), timeout=60))
        assert read(reader, reader.connect(target.address()), into, 10).status is ReadStatus.OK


def test_listens_where_it_is_told():
    transport = SocketTransport(SocketOptions(listen="::1", advertise="localhost"))
    try:
        assert inner(transport).host == "localhost"
        with socket.create_connection(("::1", inner(transport).port), timeout=60):
            pass
        taken = inner(transport).port
        with pytest.raises(TransportError, match="cannot listen"):
            SocketTransport(SocketOptions(listen="::1", ports=(taken, taken)))
    finally:
        transport.close()
    with pytest.raises(TransportError, match="at least 1"):
        SocketTransport(SocketOptions(streams=-1))


def test_takes_the_first_free_port_of_a_range():
    first = SocketTransport()
    start = inner(first).port
    second = SocketTransport(SocketOptions(ports=(start, min(start + 50, 65_535))))
    try:
        assert start < inner(second).port <= start + 50
    finally:
        second.close()
        first.close()
    with pytest.raises(TransportError, match="no ports from 9 to 8"):
        SocketTransport(SocketOptions(ports=(9, 8)))


def test_refuses_a_port_that_cannot_be():
    target, reader = SocketTransport(), SocketTransport()
    try:
        with pytest.raises(TransportError, match="port 70000"):
            reader.connect(changed(target, port=70_000))
    finally:
        reader.close()
        target.close()


# ---- memory that processors cannot touch ----


def slow_device() -> SocketTransport:
    return SocketTransport(SocketOptions(emulated_copy_us=2_000, staged_slice_bytes=64 << 10))


@pytest.mark.parametrize("hidden", ["target", "reader", "both"])
def test_either_side_may_stage(hidden: str):
    """Fewer bytes in a slot than in a slice of the other side, many slots a stream, spans of no round length."""
    target, reader = slow_device(), slow_device()
    source = filled(5_000_003, 7) if hidden == "reader" else HiddenArray(5_000_003)
    into = filled(5_000_003, 0) if hidden == "target" else HiddenArray(5_000_003)
    source.fill(7)
    try:
        target.register(source.memory)
        reader.register(into.memory)
        peer = reader.connect(target.address())
        for _ in range(2):
            reader.submit(peer, span(1, into.memory.address + 1, 5_000_001))
            assert ended(reader).status is ReadStatus.OK
            assert into.bytes[0] == 0
            assert (into.bytes[1:-1] == 7).all(), "a read was complete before its bytes were on the device"
            assert into.bytes[-1] == 0
            into.fill(0)
        assert reader.note(peer) == STAGED
    finally:
        reader.close()
        target.close()


def test_host_stages_what_is_asked_for_at_once_in_order():
    target = slow_device()
    source = HiddenArray(100_000)
    source.bytes[:50_000], source.bytes[50_000:] = 1, 2
    try:
        target.register(source.memory)
        with connection(target) as opened:
            asked = request((0, 0, 50_000), (0, 50_000, 50_000)) + request((0, 49_999, 2)) * 20 + request((0, 0, 1))
            opened.sendall(asked)
            wanted = b"\1" * 50_000 + b"\2" * 50_000 + b"\1\2" * 20 + b"\1"
            assert received(opened, len(wanted)) == wanted
            opened.sendall(request((0, 0, 10)) + request((0, 99_999, 2)))
            with contextlib.suppress(ConnectionResetError):
                assert len(received(opened, 11)) <= 10, "a request out of bounds was answered"
    finally:
        target.close()


@pytest.mark.parametrize(("processors", "streams"), [(1, 4), (15, 4), (16, 8), (192, 8)])
def test_more_processors_carry_more_streams(processors: int, streams: int):
    assert sockets._streams(processors) == streams


def test_memory_of_one_device_only():
    transport = SocketTransport()
    hidden, plain = HiddenArray(4_096), filled(4_096, 1)
    try:
        transport.register(hidden.memory)
        with pytest.raises(TransportError, match="memory of one device"):
            transport.register(plain.memory)
    finally:
        transport.close()


def test_gpu_memory_without_a_driver_is_refused_with_the_reason():
    transport = SocketTransport()
    plain = filled(4_096, 1)
    try:
        with pytest.raises(TransportError, match=r"cannot stage 4096 bytes on cuda:0: .*"):
            transport.register(LocalMemory(plain.memory.address, 4_096, device="cuda:0"))
        transport.register(plain.memory)  # and it serves host memory all the same
    finally:
        transport.close()


def test_reads_before_memory_of_a_device_are_refused(ends):
    target, _, _ = ends
    late, hidden = SocketTransport(), HiddenArray(4_096)
    try:
        late.connect(target.address())
        with pytest.raises(TransportError, match="only before it reads from anybody"):
            late.register(hidden.memory)
    finally:
        late.close()
