"""HTTP/1.1 from the router to workers, for plain TCP and nothing else; also as a transport that httpx can use.

An exchange of httpx' own takes ten times the processor time, and looks at every idle connection for every request.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import nullcontext
from typing import NamedTuple, Protocol

import httpx

_MOST_HEAD_BYTES = 256 << 10
_MOST_WAITING_BYTES = 64 << 10
"""Of an answer that nobody has taken yet; then the worker waits."""
_MOST_LINE_BYTES = 4 << 10
_MOST_KEPT = 64
"""Idle connections to one worker."""

Address = tuple[str, int]
Headers = list[tuple[bytes, bytes]]


class _Body(Protocol):
    """Where in a body we are."""

    def take(self, received: bytearray) -> bytes | None:
        """What has come of it and was not taken before, which leaves ``received``; empty = it is complete, None = more
        must come first. Raises ValueError for what is none."""
        ...


class _Head(NamedTuple):
    """An answer's first lines."""

    status: int
    headers: Headers
    body: _Body
    may_be_kept: bool


class _Connection(asyncio.Protocol):
    """One connection to a worker. Used by one request at a time."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self.kept_at = 0.0
        self._received = bytearray()
        self._has_ended = False
        self._error: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._transport: asyncio.Transport | None = None
        self._is_paused = False

    @property
    def is_open(self) -> bool:
        """The worker has neither closed it nor sent what nobody asked for."""
        return self._transport is not None and not (self._has_ended or self._received or self._transport.is_closing())

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "TCP"
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if len(self._received) > _MOST_WAITING_BYTES and not self._is_paused and self._transport is not None:
            self._is_paused = True
            self._transport.pause_reading()
        self._wake()

    def eof_received(self) -> None:
        self._has_ended = True
        self._wake()

    def connection_lost(self, exc: Exception | None) -> None:
        self._has_ended = True
        self._error = exc
        self._wake()

    async def ask(self, request: bytes, *, is_head: bool) -> _Head:
        assert self._transport is not None, "it is connected"
        self._transport.write(request)
        while True:
            head = _read_head(await self._first_lines(), is_head=is_head)
            if head.status >= 200:
                return head

    async def piece(self, body: _Body) -> bytes:
        """What comes next; empty at the end."""
        while (piece := body.take(self._received)) is None:
            if self._has_ended and isinstance(body, _ToTheEnd) and self._error is None:
                return b""
            await self._more()
        return piece

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    async def _first_lines(self) -> bytes:
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            if len(self._received) > _MOST_HEAD_BYTES:
                raise ValueError(f"more than {_MOST_HEAD_BYTES} bytes of headers")
            await self._more()
        lines = bytes(self._received[:end])
        del self._received[: end + 4]
        return lines

    async def _more(self) -> None:
        if self._has_ended:
            raise self._error or EOFError("the connection has ended")
        if self._is_paused:
            assert self._transport is not None, "it is connected"
            self._is_paused = False
            self._transport.resume_reading()
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Answer:
    """A worker's answer, its head here and its body still to be read. Read it to the end, or close it."""

    def __init__(
        self, transport: "WorkerTransport", connection: _Connection, head: _Head, read_s: float | None
    ) -> None:
        self.status = head.status
        self.headers = head.headers
        self._transport = transport
        self._connection: _Connection | None = connection
        self._head = head
        self._read_s = read_s

    def header(self, name: str) -> str:
        """Empty where there is none. ``name``: in lower case."""
        wanted = name.encode()
        return next((value.decode("latin-1") for key, value in self.headers if key.lower() == wanted), "")

    async def piece(self) -> bytes:
        """What comes next of the body; empty at its end, from where the connection is used for other requests."""
        connection = self._connection
        if connection is None:
            return b""
        with _Guard(connection):
            async with _within(self._read_s):
                piece = await connection.piece(self._head.body)
        if not piece:
            self._connection = None
            if self._head.may_be_kept:
                self._transport.keep(connection)
            else:
                connection.close()
        return piece

    async def read(self) -> bytes:
        """All of the body."""
        pieces = []
        while piece := await self.piece():
            pieces.append(piece)
        return b"".join(pieces)

    async def close(self) -> None:
        """Of a body that was not read to the end: the worker hears that nobody waits for it. Idempotent."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


class WorkerTransport(httpx.AsyncBaseTransport):
    """Connections are kept for the next request to the same worker. Belongs to one event loop.

    Raises httpx' errors: ``ConnectError`` and ``ConnectTimeout`` before anything was sent; then ``ReadTimeout`` (the
    request's own), ``ReadError``, or ``RemoteProtocolError`` for an answer that breaks off or is none.
    """

    def __init__(self, connect_timeout_s: float, keep_s: float) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._keep_s = keep_s
        self._kept: dict[Address, deque[_Connection]] = {}

    async def ask(
        self, address: Address, request: bytes, read_s: float | None = None, *, is_head: bool = False
    ) -> Answer:
        """Send what ``write_request`` made; returns when the answer's head is there."""
        connection = self._take(address) or await self._connect(address)
        with _Guard(connection):
            async with _within(read_s):
                head = await connection.ask(request, is_head=is_head)
        return Answer(self, connection, head, read_s)

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        content = await request.aread()
        message = write_request(request.method.encode(), request.url.raw_path, request.headers.raw, content)
        address = request.url.host, request.url.port or 80
        read_s: float | None = request.extensions.get("timeout", {}).get("read")
        answer = await self.ask(address, message, read_s, is_head=request.method == "HEAD")
        return httpx.Response(answer.status, headers=answer.headers, stream=_AsStream(answer))

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
                loop = asyncio.get_running_loop()
                _, connection = await loop.create_connection(lambda: _Connection(address), *address)
        except TimeoutError as exc:
            raise httpx.ConnectTimeout(f"no connection within {self._connect_timeout_s:g} s") from exc
        except OSError as exc:
            raise httpx.ConnectError(str(exc)) from exc
        return connection


class _AsStream(httpx.AsyncByteStream):
    """An answer's body, for httpx."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while piece := await self._answer.piece():
            yield piece

    async def aclose(self) -> None:
        await self._answer.close()


class _Chunked:
    """A body in chunks; what trails behind the last one is left out."""

    def __init__(self) -> None:
        self._left = 0
        """Of the chunk that is coming, the end of its line included."""
        self._is_last = False

    def take(self, received: bytearray) -> bytes | None:
        pieces: list[bytes] = []
        while received:
            if self._left:
                self._take_chunk(received, pieces)
            elif (line := _take_line(received)) is None:
                break
            elif self._is_last:
                if not line:
                    return b"".join(pieces)
            elif (size := int(line.partition(b";")[0], 16)) > 0:
                self._left = size + 2
            else:
                self._is_last = True
            if self._is_last and pieces:  # the end comes by itself, as an empty piece
                break
        return b"".join(pieces) or None

    def _take_chunk(self, received: bytearray, pieces: list[bytes]) -> None:
        if self._left > 2 and (size := min(self._left - 2, len(received))):
            pieces.append(bytes(received[:size]))
            del received[:size]
            self._left -= size
        if self._left <= 2:
            size = min(self._left, len(received))
            if bytes(received[:size]) not in (b"\r\n"[2 - self._left : 2 - self._left + size], b""):
                raise ValueError("a chunk is longer than it says")
            del received[:size]
            self._left -= size


class _Sized:
    """A body of so many bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._left = num_bytes

    def take(self, received: bytearray) -> bytes | None:
        if self._left and not received:
            return None
        piece = bytes(received[: self._left])
        del received[: len(piece)]
        self._left -= len(piece)
        return piece


class _ToTheEnd:
    """A body that ends with the connection."""

    def take(self, received: bytearray) -> bytes | None:
        piece = bytes(received)
        received.clear()
        return piece or None


def write_request(method: bytes, target: bytes, headers: Iterable[tuple[bytes, bytes]], content: bytes) -> bytes:
    """A request as it goes over the connection. Raises httpx.LocalProtocolError for a header of several lines."""
    lines = [method + b" " + target + b" HTTP/1.1"]
    lines += [name + b": " + value for name, value in headers]
    if any(b"\r" in line or b"\n" in line for line in lines):
        raise httpx.LocalProtocolError("a header holds the end of a line")
    return b"\r\n".join((*lines, b"", content))


def _take_line(received: bytearray) -> bytes | None:
    end = received.find(b"\r\n")
    if end < 0:
        if len(received) > _MOST_LINE_BYTES:
            raise ValueError("a chunk's first line has no end")
        return None
    line = bytes(received[:end])
    del received[: end + 2]
    return line


def _read_head(raw: bytes, *, is_head: bool) -> _Head:
    """Raises ValueError for what is no answer."""
    first, *rest = raw.split(b"\r\n")
    version, _, status_and_reason = first.partition(b" ")
    if version not in (b"HTTP/1.1", b"HTTP/1.0"):
        raise ValueError(f"no HTTP: {first[:40]!r}")
    status = int(status_and_reason[:3])
    headers = [(name.strip(), value.strip()) for name, _, value in (line.partition(b":") for line in rest)]
    known = {name.lower(): value.lower() for name, value in headers}
    may_be_kept = version == b"HTTP/1.1" and known.get(b"connection") != b"close"
    body: _Body
    if is_head or status < 200 or status in (204, 304):
        body = _Sized(0)
    elif known.get(b"transfer-encoding") == b"chunked":
        body = _Chunked()
    elif b"content-length" in known:
        body = _Sized(int(known[b"content-length"]))
    else:
        body, may_be_kept = _ToTheEnd(), False
    return _Head(status, headers, body, may_be_kept)


def _within(seconds: float | None) -> "asyncio.Timeout | nullcontext[None]":
    return nullcontext() if seconds is None else asyncio.timeout(seconds)


class _Guard:
    """Whatever goes wrong inside ends the connection; what is the worker's doing becomes httpx' error for it."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, tb: object) -> None:
        if exc is None:
            return
        self._connection.close()
        match exc:
            case TimeoutError():
                raise httpx.ReadTimeout("the worker is silent for too long") from exc
            case OSError():
                raise httpx.ReadError(str(exc) or type(exc).__name__) from exc
            case EOFError() | ValueError():
                raise httpx.RemoteProtocolError(f"the worker's answer broke off or is none: {exc}") from exc
