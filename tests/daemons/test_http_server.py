"""The ground that daemons' HTTP stands on."""

import asyncio
import json
import socket
from collections.abc import AsyncGenerator

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message

from pdkv.daemons import http_server
from pdkv.daemons.config import Address
from pdkv.daemons.http_server import App, EventStream
from pdkv.errors import RequestError


class Client:
    """Asks an app in this process; goes when ``gone`` is set."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()
        self.said: list[Message] = []
        self._messages: list[Message] = [{"type": "http.request", "body": b"question"}]

    async def ask(self, app: App, method: str = "POST", path: str = "/x", host: str = "127.0.0.1") -> None:
        scope = {"type": "http", "method": method, "path": path, "query_string": b"", "headers": []}
        scope["client"] = (host, 1)
        await app(scope, self._receive, self._send)

    @property
    def status(self) -> int:
        return self.said[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode().lower(): value.decode() for name, value in self.said[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.said[1:])

    async def _receive(self) -> Message:
        if self._messages:
            return self._messages.pop()
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Message) -> None:
        self.said.append(message)


@pytest.mark.parametrize(
    ("host", "method", "status"),
    [
        ("127.0.0.1", "POST", 200),
        ("::1", "POST", 200),
        ("::ffff:127.0.0.1", "POST", 200),
        ("10.0.0.9", "GET", 200),
        ("10.0.0.9", "POST", 403),
        ("::ffff:10.0.0.9", "POST", 403),
        ("fe80::1", "POST", 403),
    ],
)
def test_posts_may_be_for_callers_on_this_machine_alone(host: str, method: str, status: int) -> None:
    async def answer(_: Request) -> Response:
        return Response(b"done")

    async def go() -> None:
        for local, expected in ((True, status), (False, 200)):
            app, client = App(posts_from_here=local), Client()
            for each in ("GET", "POST"):
                app.add_route("/x", answer, each)
            await client.ask(app, method, host=host)
            assert client.status == expected
            assert (b"for callers on this machine" in client.body) is (expected == 403)

    asyncio.run(go())


def test_errors_have_one_form_and_every_answer_an_id() -> None:
    async def refuse(_: Request) -> Response:
        raise RequestError("no", param="prompt")

    async def fail(_: Request) -> Response:
        raise ZeroDivisionError

    async def go() -> None:
        app = App()
        app.add_route("/x", refuse, "POST")
        app.add_route("/y", fail, "POST")
        for method, path, status in (("POST", "/x", 400), ("GET", "/x", 405), ("GET", "/z", 404), ("POST", "/y", 500)):
            client = Client()
            await client.ask(app, method, path)
            assert client.status == status
            assert set(json.loads(client.body)["error"]) == {"message", "type", "param", "code"}
            assert len(client.headers["x-request-id"]) == 32
            assert client.headers.get("allow") == ("POST" if status == 405 else None)

    asyncio.run(go())


def test_work_ends_when_its_client_goes() -> None:
    async def go() -> None:
        began, ended = asyncio.Event(), asyncio.Event()

        async def work(request: Request) -> Response:
            await http_server.read_body(request)
            try:
                async with http_server.unless_gone(request):
                    began.set()
                    await asyncio.Event().wait()
            finally:
                ended.set()
            raise AssertionError("it waits for ever")

        app = App()
        app.add_route("/x", work, "POST")
        client = Client()
        asking = asyncio.create_task(client.ask(app))
        await began.wait()
        client.gone.set()
        await asking
        assert ended.is_set()
        assert client.status == 499

    asyncio.run(go())


def test_a_client_that_goes_late_does_not_cancel_what_follows() -> None:
    async def go() -> None:
        client = Client()

        async def work(request: Request) -> Response:
            await http_server.read_body(request)
            for _ in range(2):
                async with http_server.unless_gone(request):
                    await asyncio.sleep(0)
            client.gone.set()
            for _ in range(10):
                await asyncio.sleep(0)
            return Response(b"done")

        app = App()
        app.add_route("/x", work, "POST")
        await client.ask(app)
        assert (client.status, client.body) == (200, b"done")

    asyncio.run(go())


def test_a_deadline_inside_is_told_from_a_client_that_goes() -> None:
    async def go() -> None:
        async def work(request: Request) -> Response:
            await http_server.read_body(request)
            with pytest.raises(TimeoutError):
                async with http_server.unless_gone(request), asyncio.timeout(0):
                    await asyncio.Event().wait()
            return Response(b"late")

        app = App()
        app.add_route("/x", work, "POST")
        client = Client()
        await client.ask(app)
        assert client.body == b"late"

    asyncio.run(go())


@pytest.mark.parametrize("leaves", [False, True])
def test_a_stream_is_sent_as_it_comes_and_ends_with_its_client(leaves: bool) -> None:
    async def go() -> None:
        client, more, closed = Client(), asyncio.Event(), asyncio.Event()

        async def events() -> AsyncGenerator[bytes, None]:
            try:
                yield b"data: 1\n\n"
                await more.wait()
                yield b"data: 2\n\n"
            finally:
                closed.set()

        async def stream(request: Request) -> Response:
            await http_server.read_body(request)
            return EventStream(events())

        app = App()
        app.add_route("/x", stream, "POST")
        asking = asyncio.create_task(client.ask(app))
        while len(client.said) < 2:
            await asyncio.sleep(0)
        assert client.body == b"data: 1\n\n"
        assert client.headers["content-type"].startswith("text/event-stream")
        (client.gone if leaves else more).set()
        await asking
        assert closed.is_set()
        assert client.body == (b"data: 1\n\n" if leaves else b"data: 1\n\ndata: 2\n\n")

    asyncio.run(go())


def test_what_is_written_to_a_client_leaves_at_once() -> None:
    """Otherwise a stream's second small write waits until the first is acknowledged, which takes Linux up to 40 ms."""

    async def option() -> int:
        accepted: asyncio.Future[asyncio.BaseTransport] = asyncio.get_running_loop().create_future()

        class Protocol(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                accepted.set_result(transport)

        with http_server.listen(Address("127.0.0.1:0")) as sock:
            async with await asyncio.get_running_loop().create_server(Protocol, sock=sock):
                address = http_server.bound_address(sock)
                _, writer = await asyncio.open_connection(address.host, address.port)
                transport = await accepted
                found: int = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
                writer.close()
                transport.close()
                return found

    assert asyncio.run(option()) == 1
