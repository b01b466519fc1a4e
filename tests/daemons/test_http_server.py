"""The ground that daemons' HTTP stands on."""

import asyncio
import socket

from pdkv.daemons import http_server
from pdkv.daemons.config import Address


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
