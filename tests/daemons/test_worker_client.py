"""The router's HTTP to workers, against a server of bytes: what is sent, connections kept or ended, errors."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

from pdkv.daemons.worker_client import WorkerClient, WorkerLostError

Served = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Worker:
    """Answers each request on a connection by ``serve``; counts connections and how they ended."""

    def __init__(self, serve: Served) -> None:
        self._serve = serve
        self.url = ""
        self.requests: list[bytes] = []
        self.num_connections = 0
        self.gone = asyncio.Event()

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
async def asking(serve: Served, keep_s: float = 30.0) -> AsyncIterator[tuple[Worker, WorkerClient]]:
    worker = Worker(serve)
    server = await asyncio.start_server(worker.handle, "127.0.0.1", 0)
    worker.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with WorkerClient(5.0, keep_s) as client:
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


async def post(client: WorkerClient, url: str, body: bytes = b"x") -> bytes:
    return await (await client.post(url, body, {})).read()


def test_a_request_says_what_it_was_given_and_its_connection_is_kept() -> None:
    async def go() -> None:
        async with asking(saying(CHUNKED, b"2\r\no", b"k\r\n0\r\n\r\n")) as (worker, client):
            for _ in range(3):
                answer = await client.post(f"{worker.url}/v1/x?y=1", b"question", {"x-one": "two"})
                assert (answer.status, answer.header("transfer-encoding"), answer.header("x")) == (200, "chunked", "")
                assert await answer.read() == b"ok"
            assert worker.num_connections == 1
            for request in worker.requests:
                assert request.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\n")
                assert b"\r\nx-one: two\r\n" in request
                assert request.endswith(b"\r\n\r\nquestion")

    asyncio.run(go())


def test_a_redirection_is_an_answer_like_any_other() -> None:
    async def go() -> None:
        moved = b"HTTP/1.1 307 Temporary Redirect\r\nLocation: http://elsewhere/\r\nContent-Length: 0\r\n\r\n"
        async with asking(saying(moved)) as (worker, client):
            assert (await client.post(worker.url, b"x", {})).status == 307
            assert (await client.ask("GET", worker.url, 30.0)).status == 307

    asyncio.run(go())


def test_a_worker_waits_while_nobody_takes_its_answer() -> None:
    size = 64 << 20

    async def go() -> None:
        written = asyncio.Event()

        async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size + bytes(size))
            await writer.drain()
            written.set()

        async with asking(serve) as (worker, client):
            answer = await client.post(worker.url, b"", {})
            for _ in range(1000):
                await asyncio.sleep(0)
            assert not written.is_set()
            num_bytes = 0
            while piece := await answer.piece():
                num_bytes += len(piece)
            assert num_bytes == size

    asyncio.run(go())


def test_large_bodies_both_ways() -> None:
    async def serve(body: bytes, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            content = bytes(range(256)) * 20_000
            assert await post(client, worker.url, content) == content

    asyncio.run(go())


def test_pieces_come_as_they_are_sent() -> None:
    async def go() -> None:
        told = asyncio.Event()

        async def serve(_: bytes, __: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(CHUNKED + b"3\r\none\r\n")
            await told.wait()
            writer.write(b"3\r\ntwo\r\n0\r\n\r\n")

        async with asking(serve) as (worker, client):
            answer = await client.post(worker.url, b"", {})
            assert await answer.piece() == b"one"
            told.set()
            assert [await answer.piece(), await answer.piece(), await answer.piece()] == [b"two", b"", b""]

    asyncio.run(go())


def test_a_body_that_is_not_read_ends_the_connection() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            answer = await client.post(worker.url, b"", {})
            answer.close()
            answer.close()
            async with asyncio.timeout(30):
                await worker.gone.wait()

    asyncio.run(go())


def test_a_request_that_is_cancelled_ends_the_connection() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            task = asyncio.create_task(client.post(worker.url, b"x", {}))
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
            writer.write(OK)

        async with asking(serve) as (worker, client):
            for _ in range(2):
                assert await asyncio.gather(*(post(client, worker.url) for _ in range(2))) == [b"ok", b"ok"]
            assert worker.num_connections == 2

    asyncio.run(go())


def test_a_connection_that_waited_too_long_is_not_used_again() -> None:
    async def go() -> None:
        async with asking(saying(OK), keep_s=0.01) as (worker, client):
            assert await post(client, worker.url) == b"ok"
            async with asyncio.timeout(30):
                await worker.gone.wait()
            assert await post(client, worker.url) == b"ok"
            assert worker.num_connections == 2

    asyncio.run(go())


@pytest.mark.parametrize(
    "pieces",
    [
        (),
        (b"HTTP/1.1 200 OK\r\nConte",),
        (b"220 smtp ready\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhello",),
        (CHUNKED + b"5\r\nhel",),
        (CHUNKED + b"five\r\nhello\r\n",),
        (CHUNKED + b"5\r\nhello!!0\r\n\r\n",),
        (b"HTTP/1.1 200 OK\r\nx: " + b"y" * 300_000 + b"\r\n\r\n",),
    ],
)
def test_answers_that_break_off_or_are_none(pieces: tuple[bytes, ...]) -> None:
    async def go() -> None:
        async with asking(saying(*pieces, close=True)) as (worker, client):
            with pytest.raises(WorkerLostError, match=r"\w+: ."):
                await post(client, worker.url)

    asyncio.run(go())


def test_nobody_there_and_nobody_answering() -> None:
    async def serve(_: bytes, reader: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        await reader.read(1)

    async def go() -> None:
        async with asking(serve) as (worker, client):
            with pytest.raises(WorkerLostError, match="Timeout"):
                await client.ask("GET", worker.url, 0.05)
            url = worker.url
        async with WorkerClient(5.0, 30.0) as client:
            for asked in (client.post(url, b"x", {}), client.ask("GET", url, 5.0)):
                with pytest.raises(WorkerLostError, match="cannot connect: Connect call failed"):
                    await asked

    asyncio.run(go())


def test_a_header_cannot_bring_lines_of_its_own() -> None:
    async def go() -> None:
        async with asking(saying()) as (worker, client):
            with pytest.raises(WorkerLostError, match="ValueError"):
                await client.post(worker.url, b"x", {"x": "a\r\ny: b"})
            assert worker.requests == []

    asyncio.run(go())
