"""How the router puts clients' requests to workers: nothing but a POST, over connections that are kept."""

from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple, Protocol

import httpx

from pdkv.daemons.worker_transport import Address, WorkerTransport, write_request


class WorkerAnswer(Protocol):
    """A worker's answer, its head here and its body still to be read. Raises httpx' errors."""

    @property
    def status(self) -> int: ...

    def header(self, name: str) -> str:
        """Empty where there is none. ``name``: in lower case."""
        ...

    async def piece(self) -> bytes:
        """What comes next of the body; empty at its end."""
        ...

    async def read(self) -> bytes:
        """All of the body."""
        ...

    async def close(self) -> None:
        """Of a body that was not read to the end: the worker hears that nobody waits for it. Idempotent."""
        ...


class WorkerClient:
    """Belongs to one event loop, as client and transport do.

    A request over plain TCP does without httpx' own half: it knows of redirects, cookies and proxies, which no worker
    does, and takes most of an exchange's processor time. ``https://`` workers are asked over it.
    """

    def __init__(self, client: httpx.AsyncClient, transport: WorkerTransport) -> None:
        self._client = client
        self._transport = transport

    async def post(self, url: str, body: bytes, headers: Mapping[str, str]) -> WorkerAnswer:
        """The answer, its body still to be read. Raises httpx' errors."""
        target = _target(url)
        if target is None:
            request = self._client.build_request("POST", url, content=body, headers=dict(headers))
            return _HttpxAnswer(await self._client.send(request, stream=True))
        lines = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
        lines += [(b"host", target.host), (b"content-length", b"%d" % len(body))]
        return await self._transport.ask(target.address, write_request(b"POST", target.path, lines, body))


class _HttpxAnswer:
    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._pieces = response.aiter_raw()

    @property
    def status(self) -> int:
        return self._response.status_code

    def header(self, name: str) -> str:
        return str(self._response.headers.get(name, ""))

    async def piece(self) -> bytes:
        return await anext(self._pieces, b"")

    async def read(self) -> bytes:
        return await self._response.aread()

    async def close(self) -> None:
        await self._response.aclose()


class _Target(NamedTuple):
    address: Address
    host: bytes
    path: bytes


@lru_cache(maxsize=256)
def _target(url: str) -> _Target | None:
    """Where a request over plain TCP goes; None for another scheme."""
    parsed = httpx.URL(url)
    if parsed.scheme != "http":
        return None
    return _Target((parsed.host, parsed.port or 80), parsed.netloc, parsed.raw_path)
