"""The router's HTTP to workers, over connections that are kept."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import aiohttp

_MOST_AT_ONCE = 1 << 20
"""Bytes of a body that are written at once; of a larger one the loop turns between pieces."""


class WorkerLostError(Exception):
    """A worker that could not be asked, or whose answer broke off or is none; says what happened."""


class WorkerAnswer:
    """A worker's answer, its head here and its body still to be read. Read it to the end, or close it.

    What is not taken waits, and beyond 128 KiB the worker waits with it.
    """

    def __init__(self, response: aiohttp.ClientResponse) -> None:
        self._response = response

    @property
    def status(self) -> int:
        return self._response.status

    def header(self, name: str) -> str:
        """Empty where there is none."""
        return self._response.headers.get(name, "")

    async def piece(self) -> bytes:
        """What comes next of the body; empty at its end. Raises WorkerLostError when it breaks off."""
        with _as_lost():
            return await self._response.content.readany()

    async def read(self) -> bytes:
        """All of the body. Raises WorkerLostError when it breaks off."""
        with _as_lost():
            return await self._response.read()

    def close(self) -> None:
        """Of a body that was not read to the end: the worker hears that nobody waits for it. Idempotent."""
        self._response.close()


class WholeAnswer(NamedTuple):
    status: int
    body: bytes


class WorkerClient:
    """Belongs to one event loop; close it there. No proxy, cookies, redirects or limit on connections, and no time
    limit but that of a connection's beginning: a request's own is the caller's.
    """

    def __init__(self, connect_timeout_s: float, keep_s: float) -> None:
        """``keep_s``: seconds after which an idle connection is not used again."""
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=keep_s),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("Accept", "Accept-Encoding", "User-Agent"),
            auto_decompress=False,
        )

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> WorkerAnswer:
        """The answer, when its head is there. Raises WorkerLostError; cancelled, it ends the connection."""
        data = body if len(body) <= _MOST_AT_ONCE else io.BytesIO(body)
        with _as_lost():
            return WorkerAnswer(await self._session.post(url, data=data, headers=headers, allow_redirects=False))

    async def ask(
        self, method: str, url: str, timeout_s: float, *, body: bytes = b"", headers: Mapping[str, str] | None = None
    ) -> WholeAnswer:
        """The whole answer, within ``timeout_s``. Raises WorkerLostError."""
        limit = aiohttp.ClientTimeout(total=timeout_s)
        with _as_lost():
            asking = self._session.request(
                method, url, data=body or None, headers=headers, timeout=limit, allow_redirects=False
            )
            async with asking as response:
                return WholeAnswer(response.status, await response.read())

    async def close(self) -> None:
        await self._session.close()

    async def __aenter__(self) -> "WorkerClient":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


@contextmanager
def _as_lost() -> Iterator[None]:
    """aiohttp's errors, and what it lets through of the system's, become ours."""
    try:
        yield
    except aiohttp.ClientConnectorError as exc:
        raise WorkerLostError(f"cannot connect: {exc.strerror}") from exc
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
        raise WorkerLostError(f"{type(exc).__name__}: {exc}".removesuffix(": ")) from exc
