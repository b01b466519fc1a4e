"""Finds workers behind a DNS name, again and again: one worker for each address, as headless Services publish them."""

import asyncio
import contextlib
import socket
import threading
from collections.abc import Awaitable, Callable

import structlog

from pdkv.daemons.config import DNS_SCHEME, Address

_log = structlog.get_logger(__name__)

Resolve = Callable[[str, int], Awaitable[tuple[str, ...]]]
"""The addresses of a name, in no order that matters; none when the name has none. Raises ``OSError`` when that could
not be found out."""

_HAS_NO_ADDRESS = (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME))


class Lookup:
    """One ``dns://HOST:PORT`` and the workers last found behind it. Belongs to the event loop's thread.

    A name that has no address has no worker. A name server that does not answer takes nothing away: the workers found
    before are kept, and ``problem`` says why nothing newer is known.
    """

    def __init__(self, target: str, resolve: Resolve) -> None:
        self.target = target
        self.urls: tuple[str, ...] = ()
        """Sorted, each once."""
        self.problem = "not looked up yet"
        """Empty while the last look found a worker."""
        self._address = Address(target.removeprefix(DNS_SCHEME))
        self._resolve = resolve

    async def look(self) -> bool:
        """Resolve the name once; True when ``urls`` changed."""
        before, had = self.problem, self.urls
        try:
            hosts = await self._resolve(self._address.host, self._address.port)
        except OSError as exc:
            self.problem = f"cannot be resolved: {exc.strerror or exc}"
        else:
            self.urls = tuple(sorted({f"http://{_bracketed(host)}:{self._address.port}" for host in hosts}))
            self.problem = "" if hosts else "has no address"
        if self.problem != before:
            log = _log.warning if self.problem else _log.info
            log("looked up", target=self.target, num_addresses=len(self.urls), problem=self.problem)
        return self.urls != had


async def resolve_by_system(host: str, port: int) -> tuple[str, ...]:
    """All A and AAAA records that the system's resolver gives.

    It runs in a thread of its own that nobody waits for at exit: a resolver may take many seconds to give up.
    """
    loop = asyncio.get_running_loop()
    found: asyncio.Future[tuple[str, ...]] = loop.create_future()

    def tell(hosts: tuple[str, ...], error: OSError | None) -> None:
        if found.done():  # whoever asked has gone
            return
        if error is None:
            found.set_result(hosts)
        else:
            found.set_exception(error)

    def ask() -> None:
        hosts: tuple[str, ...] = ()
        error: OSError | None = None
        try:
            entries = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            hosts = tuple(str(sockaddr[0]) for *_, sockaddr in entries)
        except OSError as exc:
            error = None if exc.errno in _HAS_NO_ADDRESS else exc
        with contextlib.suppress(RuntimeError):  # the loop has been closed: nobody waits any more
            loop.call_soon_threadsafe(tell, hosts, error)

    threading.Thread(target=ask, name=f"resolve-{host}", daemon=True).start()
    return await found


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
