"""The router's HTTP to workers, against a server of bytes: every form of answer, connections kept or not, errors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest

from pdkv.daemons.worker_transport import WorkerTransport

Served = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class Worker:
    """Answers each request on a connection by ``serve``; counts connections and how they ended."""

    def __init__(self, serve: Served) -> None:
        self._serve = serve
        self.url = ""
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.gone = asyncio.Event()
        self.transport = WorkerTransport(5.0, 30.0)
        """The other end."""

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_connections += 1
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
                body = await reader.readexactly(int(length[0].split(b":")[1])) if length else b""
                self.requests.append(head + body)
                await self._serve(body, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.gone.set()
            writer.close()


@asynccontextmanager
async def asking(serve: Served, keep_s: float = 30.0) -> AsyncIterator[tuple[Worker, httpx.AsyncClient]]:
    worker = Worker(serve)
    server = await asyncio.start_server(worker.handle, "127.0.0.1", 0)
    worker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    worker.transport = WorkerTransport(5.0, keep_s)
    async with httpx.AsyncClient(mounts={"http://": worker.transport}, trust_env=False) as client:
        yield worker, client
    server.close()
    await server.wait_closed()


def saying(*pieces: bytes, close: bool = False) -> Served:
    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if close:
            writer.close()

    return serve


@pytest.mark.parametrize(
    ("pieces", "close", "status", "body"),
    [
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\n", b"he", b"llo"), False, 200, b"hello"),
        ((b"HTTP/1.1 404 Not Found\r\ncontent-length:0\r\n\r\n",), False, 404, b""),
        ((b"HTTP/1.1 204 No Content\r\n\r\n",), False, 204, b""),
        (
            (CHUNKED + b"5\r\nhel", b"lo\r\nA;x=1\r\n", b"0123456789\r\n0", b"\r\nx: y\r\n\r\n"),
            False,
            200,
            b"hello0123456789",
        ),
        ((b"HTTP/1.1 100 Continue\r\n\r\n", CHUNKED, b"0\r\n\r\n"), False, 200, b""),
        ((b"HTTP/1.1 200 OK\r\n\r\nas long as it", b" lasts"), True, 200, b"as long as it lasts"),
        ((b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok",), False, 200, b"ok"),
        ((b"HTTP/1.1 413 Too Large\r\nConnection: close\r\nContent-Length: 3\r\n\r\nbig",), True, 413, b"big"),
    ],
)
def test_every_form_of_answer(pieces: tuple[bytes, ...], close: bool, status: int, body: bytes) -> None:
    async def go() -> None:
        async with asking(saying(*pieces, close=close)) as (worker, client):
            for _ in range(3):
                answer = await client.post(f"{worker.url}/v1/x?y=1", content=b"question", headers={"x-one": "two"})
                assert (answer.status_code, answer.content) == (status, body)
            plain = b"HTTP/1.1" in pieces[0] and not close
            assert worker.num_connections == (1 if plain else 3)
            assert all(r.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n") for r in worker.requests)
            assert all(b"\r\nx-one: two\r\n" in r and r.endswith(b"\r\n\r\nquestion") for r in worker.requests)

    asyncio.run(go())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_an_answer_may_come_in_pieces_of_any_size(size: int) -> None:
    whole = CHUNKED + b"5\r\nhello\r\nA;x=1\r\n0123456789\r\n0\r\nx: y\r\n\r\n"
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]

    async def go() -> None:
        async with asking(saying(*pieces)) as (worker, client):
            for _ in range(2):
                assert (await client.post(worker.url, content=b"x")).content == b"hello0123456789"
            assert worker.num_connections == 1

    asyncio.run(go())


def test_a_worker_waits_while_nobody_takes_its_answer() -> None:
    told = asyncio.Event()

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (64 << 20) + bytes(64 << 20))
        told.set()
        await writer.drain()

    async def go() -> None:
        async with asking(serve) as (worker, client), client.stream("POST", worker.url, content=b"") as answer:
            await told.wait()
            for _ in range(100):
                await asyncio.sleep(0)
            stream = answer.stream
            received = stream._stream._answer._connection._received
            assert len(received) < 1 << 20
            num_bytes = 0
            async for piece in answer.aiter_raw():
                num_bytes += len(piece)
            assert num_bytes == 64 << 20

    asyncio.run(go())


def test_large_bodies_both_ways() -> None:
    async def serve(body: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            content = bytes(range(256)) * 20_000
            assert (await client.post(worker.url, content=content)).content == content

    asyncio.run(go())


def test_pieces_come_as_they_are_sent() -> None:
    told = asyncio.Event()

    async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await told.wait()
        writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

    async def go() -> None:
        async with asking(serve) as (worker, client), client.stream("POST", worker.url, content=b"") as answer:
            pieces = answer.aiter_raw()
            assert await anext(pieces) == b"one"
            told.set()
            assert [piece async for piece in pieces] == [b"two"]

    asyncio.run(go())


def test_a_body_that_is_not_read_ends_the_connection() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            async with client.stream("POST", worker.url, content=b"") as answer:
                assert answer.status_code == 200
            async with asyncio.timeout(30):
                await worker.gone.wait()

    asyncio.run(go())


def test_a_request_that_is_cancelled_ends_the_connection() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            task = asyncio.create_task(client.post(worker.url, content=b"x"))
            while not worker.requests:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            async with asyncio.timeout(30):
                await worker.gone.wait()

    asyncio.run(go())


def test_requests_at_the_same_time_have_connections_of_their_own() -> None:
    async def go() -> None:
        both = asyncio.Barrier(2)

        async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await both.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        async with asking(serve) as (worker, client):
            for _ in range(2):
                answers = await asyncio.gather(*(client.post(worker.url, content=b"") for _ in range(2)))
                assert [answer.text for answer in answers] == ["ok", "ok"]
            assert worker.num_connections == 2

    asyncio.run(go())


def test_a_connection_that_waited_too_long_is_not_used_again() -> None:
    async def go() -> None:
        async with asking(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"), keep_s=-1.0) as (worker, client):
            for _ in range(2):
                assert (await client.get(worker.url)).text == "ok"
            assert worker.num_connections == 2

    asyncio.run(go())


def test_a_connection_that_the_worker_closed_meanwhile_is_not_used_again() -> None:
    async def go() -> None:
        async with asking(saying(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", close=True)) as (worker, client):
            assert (await client.get(worker.url)).text == "ok"
            async with asyncio.timeout(30):
                await worker.gone.wait()
            ((kept,),) = worker.transport._kept.values()
            async with asyncio.timeout(30):
                while kept.is_open:  # its end is on the way through the kernel
                    await asyncio.sleep(0)
            assert (await client.get(worker.url)).text == "ok"
            assert worker.num_connections == 2

    asyncio.run(go())


@pytest.mark.parametrize(
    ("pieces", "error"),
    [
        ((), httpx.RemoteProtocolError),
        ((b"HTTP/1.1 200 OK\r\nConte",), httpx.RemoteProtocolError),
        ((b"220 smtp ready\r\n\r\n",), httpx.RemoteProtocolError),
        ((b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",), httpx.RemoteProtocolError),
        ((CHUNKED + b"5\r\nhel",), httpx.RemoteProtocolError),
        ((CHUNKED + b"five\r\nhello\r\n",), httpx.RemoteProtocolError),
        ((CHUNKED + b"5\r\nhello!!0\r\n\r\n",), httpx.RemoteProtocolError),
        ((CHUNKED + b"5" * 9_000,), httpx.RemoteProtocolError),
        ((b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000,), httpx.RemoteProtocolError),
    ],
)
def test_answers_that_break_off_or_are_none(pieces: tuple[bytes, ...], error: type[Exception]) -> None:
    async def go() -> None:
        async with asking(saying(*pieces, close=True)) as (worker, client):
            with pytest.raises(error):
                await client.post(worker.url, content=b"x")

    asyncio.run(go())


def test_nobody_there_and_nobody_answering() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            with pytest.raises(httpx.ReadTimeout):
                await client.get(worker.url, timeout=0.05)
            url = worker.url
        async with httpx.AsyncClient(mounts={"http://": WorkerTransport(5.0, 30.0)}, trust_env=False) as client:
            with pytest.raises(httpx.ConnectError):
                await client.get(url)

    asyncio.run(go())


def test_a_header_cannot_bring_lines_of_its_own() -> None:
    async def go() -> None:
        async with asking(saying()) as (worker, client):
            with pytest.raises(httpx.LocalProtocolError):
                await client.get(worker.url, headers={"x": "a\r\ny: b"})
            assert worker.num_connections == 0

    asyncio.run(go())
