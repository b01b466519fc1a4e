"""Reads over TCP: several connections a peer, each asking ahead, each received where the bytes belong.

For hosts with neither RDMA nor memory that can be shared. Memory of a GPU is staged: copied to pinned host memory while
what was copied before is sent, and up again while more is received. Reads are authorised by a token that travels on the
control channel; bytes on the wire are not encrypted.
"""

import errno
import os
import socket

import msgspec

from pdkv.errors import TransportError
from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport.base import PeerId
from pdkv.transport.pulling import MANY_PROCESSORS, FarEnd, FarMemory, PullingTransport, PullLimits
from pdkv.transport.sealed import seal, unseal

_MAGIC = b"pdkvtcp1"

_ON_DEVICE = b"device"
"""The key of memory that its owner stages."""

STAGED = "staged through pinned host memory"


class SocketOptions(msgspec.Struct, frozen=True):
    """Where a ``SocketTransport`` listens, and how it reads."""

    listen: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" and "::" are all of this machine's."""
    advertise: str = ""
    """Host that peers connect to; empty = ``listen``."""
    ports: tuple[int, int] = (0, 0)
    """First and last port to try; (0, 0) = any."""
    streams: int = 0
    """Connections to one peer; 0 = four, or eight where there are processors to spare."""
    slice_bytes: int = 256 << 10
    """Most bytes of one request: few enough that they stay in the cores' caches between kernel and destination. Eight
    requests are on their way on each connection, 8 MiB of one peer in all (of four connections)."""
    staged_slice_bytes: int = 1 << 20
    """The same where memory is staged, and the size of pinned buffers, four a connection: long enough for the speed of
    copies to and from a GPU."""
    emulated_copy_us: int = 0
    """For tests: memory on "emulated" is a GPU's for all that the transport knows; each copy takes so long."""


class _Address(msgspec.Struct, frozen=True, array_like=True):
    host: str
    port: int
    token: bytes


class SocketTransport(PullingTransport):
    """See ``Transport`` and ``PullingTransport``.

    A host that vanished without a word is noticed after some ten seconds; a peer that is stopped is not, and is left
    to the deadline of whoever reads.
    """

    name = "sockets"
    reported_path = "tcp"

    def __init__(self, options: SocketOptions | None = None) -> None:
        """Raises ``TransportError`` when the address cannot be listened on."""
        options = options or SocketOptions()
        if options.streams < 0 or options.slice_bytes < 1 or options.staged_slice_bytes < 1:
            raise TransportError("SocketOptions: sizes must be at least 1, and streams at least 0")
        streams = options.streams or _streams(len(os.sched_getaffinity(0)))
        listener = _listen(options)
        self._where = (options.advertise or options.listen, listener.getsockname()[1])
        super().__init__(
            listener,
            PullLimits(
                streams,
                streams,
                options.slice_bytes,
                staged_slice_bytes=options.staged_slice_bytes,
                emulated_copy_us=options.emulated_copy_us,
            ),
        )
        self._staged_peers: set[PeerId] = set()

    def connect(self, address: TransportAddress) -> PeerId:
        peer = super().connect(address)
        keys = [unseal(_MAGIC, memory.key, "the key of the peer's memory") for memory in address.memories]
        if any(key == _ON_DEVICE for key in keys) or self._device is not None:
            self._staged_peers.add(peer)
        return peer

    def note(self, peer: PeerId) -> str:
        return STAGED if peer in self._staged_peers else ""

    def _key_of(self, memory: LocalMemory) -> tuple[bytes, int]:
        return seal(_MAGIC, b"" if memory.device == "cpu" else _ON_DEVICE), -1

    def _own_address(self) -> bytes:
        return seal(_MAGIC, msgspec.msgpack.encode(_Address(*self._where, self._token)))

    def _far_end(self, address: TransportAddress) -> tuple[FarEnd, list[FarMemory]]:
        try:
            far = msgspec.msgpack.decode(unseal(_MAGIC, address.address, "the peer's address"), type=_Address)
        except msgspec.MsgspecError as error:
            raise TransportError(f"the peer's TCP address says nothing that this version knows: {error}") from error
        if not 0 < far.port < 1 << 16:
            raise TransportError(f"the peer listens on port {far.port}, which there is not")
        for index, memory in enumerate(address.memories):
            unseal(_MAGIC, memory.key, f"the key of the peer's memory {index}")
        end = FarEnd(far.host.encode("idna" if not far.host.isascii() else "ascii"), far.token, far.port)
        return end, [FarMemory(memory.length) for memory in address.memories]


def _streams(processors: int) -> int:
    """Each connection keeps a thread busy on both ends; two workers of one machine share its processors."""
    return 8 if processors >= MANY_PROCESSORS else 4


def _listen(options: SocketOptions) -> socket.socket:
    """On the first port that is free."""
    first, last = options.ports
    for port in range(first, last + 1):
        try:
            return _listen_on(options.listen, port)
        except OSError as error:
            if error.errno != errno.EADDRINUSE or port == last:
                raise TransportError(f"cannot listen for readers on {options.listen} port {port}: {error}") from error
    raise TransportError(f"SocketOptions: there are no ports from {first} to {last}")


def _listen_on(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[
        0
    ]
    listener = socket.socket(family, kind, protocol)
    try:
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # the last life's connections linger
        listener.bind(where)
        listener.listen(256)
    except OSError:
        listener.close()
        raise
    return listener
