"""What is running here, for ``GET /version`` of every port and ``pdkv version --json``."""

import platform

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import pdkv
from pdkv.daemons import http_server
from pdkv.schema import PROTOCOL_VERSION

PATH = "/version"


class Version(msgspec.Struct, frozen=True):
    schema: str = "pdkv.version/v1"
    version: str = pdkv.__version__
    protocol: int = PROTOCOL_VERSION
    """Workers of different protocols refuse each other."""
    python: str = platform.python_version()


async def show(_request: Request) -> Response:
    return http_server.json_response(msgspec.json.encode(Version()))
