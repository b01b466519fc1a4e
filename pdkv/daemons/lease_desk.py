"""The leases of a prefill worker, on its admin port: ``GET /leases`` and ``POST /leases/release``."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pdkv.daemons import http_server
from pdkv.daemons.engine_link import EngineGoneError, EngineLink
from pdkv.daemons.link import LeaseStatus
from pdkv.daemons.openai_api import ApiError
from pdkv.errors import FailureCode

LEASES_PATH, RELEASE_PATH = "/leases", "/leases/release"


class Leases(msgspec.Struct, frozen=True):
    """Answer of ``GET /leases``, the oldest lease first."""

    leases: list[LeaseStatus]


class Release(msgspec.Struct, frozen=True):
    """Body of ``POST /leases/release``; the answer is the lease as it was."""

    transfer: str
    """32 hex digits."""


class LeaseDesk:
    """Asks the engine process. Belongs to the event loop's thread."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link

    def add_to(self, app: http_server.App) -> None:
        app.add_route(LEASES_PATH, self.show)
        app.add_route(RELEASE_PATH, self.release, "POST")

    async def show(self, _request: Request) -> Response:
        return http_server.json_response(msgspec.json.encode(Leases(await self._leases())))

    async def release(self, request: Request) -> Response:
        """Fail a transfer. Its pages come back when decode has let go, or when the lease ends."""
        try:
            wanted = msgspec.json.decode(await http_server.read_body(request), type=Release).transfer
        except msgspec.MsgspecError as exc:
            raise ApiError.of(400, f'the body must be {{"transfer": "<32 hex digits>"}}: {exc}') from exc
        for lease in await self._leases():
            if lease.transfer == wanted:
                self._link.release_lease(bytes.fromhex(wanted))
                return http_server.json_response(msgspec.json.encode(lease))
        raise ApiError.of(404, f"no lease of transfer {wanted!r} is active here; it may have ended", code="no_lease")

    async def _leases(self) -> list[LeaseStatus]:
        if self._link.ready is None:
            raise ApiError.of(503, "the model is still loading", code="loading", retry_after_s=1)
        try:
            found = (await self._link.status()).leases
        except EngineGoneError as exc:
            raise ApiError.of(503, str(exc), code=FailureCode.SHUTDOWN.value) from exc
        return sorted(found, key=lambda lease: -lease.age_s)
