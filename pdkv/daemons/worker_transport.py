"""HTTP/1.1 from the router to workers: what httpx asks of a transport, for plain TCP, and nothing else.

httpx' own looks at every kept connection for every request, and takes ten times the processor time of the exchange.
"""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx

_MOST_HEAD_BYTES = 256 << 10
_MOST_AT_ONCE = 64 << 10
_MOST_KEPT = 64
"""Idle connections to one worker."""

Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]


class _Head(NamedTuple):
    """An answer's first lines."""

    status: int
    headers: Headers
    is_chunked: bool
    num_bytes: int | None
    """Of the body; None = until the connection ends, or chunked."""
    may_be_kept: bool


class _Connection:
    """One connection to a worker. Used by one request at a time."""

    def __init__(self, address: Address, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.address = address
        self.reader = reader
        self.kept_at = 0.0
        self._writer = writer

    @property
    def is_open(self) -> bool:
        """The worker has neither closed it nor sent what nobody asked for."""
        return not (self.reader.at_eof() or self._writer.is_closing())

    async def ask(self, request: bytes, *, is_head: bool) -> _Head:
        self._writer.write(request)
        with contextlib.suppress(OSError):  # it may have answered before it closed: 413, say
            await self._writer.drain()
        while True:
            head = _read_head(await self.reader.readuntil(b"\r\n\r\n"), is_head=is_head)
            if head.status >= 200:
                return head

    def close(self) -> None:
        self._writer.close()


class WorkerTransport(httpx.AsyncBaseTransport):
    """Connections are kept for the next request to the same worker. Belongs to one event loop.

    Raises httpx' errors: ``ConnectError`` and ``ConnectTimeout`` before anything was sent; then ``ReadTimeout`` (the
    request's own), ``ReadError``, or ``RemoteProtocolError`` for an answer that breaks off or is none.
    """

    def __init__(self, connect_timeout_s: float, keep_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keep_s = keep_s
        self._kept: dict[Address, deque[_Connection]] = {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        message = _message(request, content)
        address = request.url.host, request.url.port or 80
        connection = self._take(address) or await self._connect(address)
        read_s: float | None = request.extensions.get("timeout", {}).get("read")
        try:
            async with asyncio.timeout(read_s):
                head = await connection.ask(message, is_head=request.method == "HEAD")
        except BaseException as exc:
            connection.close()
            error = _as_httpx(exc)
            if error is None:
                raise
            raise error from exc
        return httpx.Response(head.status, headers=head.headers, stream=_Body(self, connection, head, read_s))

    async def aclose(self) -> None:
        for kept in self._kept.values():
            for connection in kept:
                connection.close()
        self._kept.clear()

    def keep(self, connection: _Connection) -> None:
        """Its last answer has been read to the end."""
        kept = self._kept.setdefault(connection.address, deque())
        connection.kept_at = time.monotonic()
        kept.append(connection)
        if len(kept) > _MOST_KEPT:
            kept.popleft().close()

    def _take(self, address: Address) -> _Connection | None:
        """The one that was used last; those that have waited too long go."""
        kept = self._kept.get(address)
        if not kept:
            return None
        oldest = time.monotonic() - self._keep_s
        while kept and kept[0].kept_at < oldest:
            kept.popleft().close()
        while kept:
            connection = kept.pop()
            if connection.is_open:
                return connection
            connection.close()
        return None

    async def _connect(self, address: Address) -> _Connection:
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                reader, writer = await asyncio.open_connection(*address, limit=_MOST_HEAD_BYTES)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection within {self._connect_timeout_s:g} s") from exc
        except OSError as exc:
            raise httpx.ConnectError(str(exc)) from exc
        return _Connection(address, reader, writer)


class _Body(httpx.AsyncByteStream):
    """An answer's body, as it comes; its connection is kept when all of it was read."""

    def __init__(self, transport: WorkerTransport, connection: _Connection, head: _Head, read_s: float | None) -> None:
        self._transport = transport
        self._connection: _Connection | None = connection
        self._head = head
        self._read_s = read_s

    async def __aiter__(self) -> AsyncIterator[bytes]:
        connection = self._connection
        assert connection is not None, "a body is read once"
        pieces = self._pieces(connection.reader)
        try:
            while True:
                async with asyncio.timeout(self._read_s):
                    piece = await anext(pieces, None)
                if piece is None:
                    break
                yield piece
        except Exception as exc:
            error = _as_httpx(exc)
            if error is None:
                raise
            raise error from exc
        self._connection = None
        if self._head.may_be_kept:
            self._transport.keep(connection)
        else:
            connection.close()

    async def aclose(self) -> None:
        """Of a body that was not read to the end: the worker hears that nobody waits for it."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _pieces(self, reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
        if self._head.is_chunked:
            return _chunked(reader)
        return _to_the_end(reader) if self._head.num_bytes is None else _exactly(reader, self._head.num_bytes)


async def _chunked(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
        async for piece in _exactly(reader, size):
            yield piece
        await reader.readexactly(2)
    while await reader.readuntil(b"\r\n") != b"\r\n":
        pass  # trailers


async def _exactly(reader: asyncio.StreamReader, num_bytes: int) -> AsyncIterator[bytes]:
    while num_bytes:
        piece = await reader.read(min(num_bytes, _MOST_AT_ONCE))
        if not piece:
            raise asyncio.IncompleteReadError(b"", num_bytes)
        num_bytes -= len(piece)
        yield piece


async def _to_the_end(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    while piece := await reader.read(_MOST_AT_ONCE):
        yield piece


def _message(request: httpx.Request, content: bytes) -> bytes:
    lines = [b"%s %s HTTP/1.1" % (request.method.encode(), request.url.raw_path)]
    lines += [name + b": " + value for name, value in request.headers.raw]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise httpx.LocalProtocolError("a header holds the end of a line")
    return b"\r\n".join((*lines, b"", content))


def _read_head(raw: bytes, *, is_head: bool) -> _Head:
    """Raises ValueError for what is no answer."""
    first, *rest = raw[:-4].split(b"\r\n")
    version, _, status_and_reason = first.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise ValueError(f"no HTTP: {first[:40]!r}")
    status = int(status_and_reason[:3])
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in rest)]
    known = {name.lower(): value.lower() for name, value in headers}
    is_empty = is_head or status < 200 or status in (204, 304)
    is_chunked = known.get(b"transfer-encoding") == b"chunked" and not is_empty
    length = known.get(b"content-length")
    num_bytes = 0 if is_empty else None if is_chunked or length is None else int(length)
    may_be_kept = version == b"HTTP/1.1" and known.get(b"connection") != b"close"
    return _Head(status, headers, is_chunked, num_bytes, may_be_kept and (is_chunked or num_bytes is not None))


def _as_httpx(exc: BaseException) -> httpx.HTTPError | None:
    """What httpx would raise; None for what is not the worker's doing."""
    match exc:
        case TimeoutError():
            return httpx.ReadTimeout("the worker is silent for too long")
        case OSError():
            return httpx.ReadError(str(exc) or type(exc).__name__)
        case asyncio.IncompleteReadError() | asyncio.LimitOverrunError() | ValueError():
            return httpx.RemoteProtocolError(f"the worker's answer broke off or is none: {exc}")
        case _:
            return None
