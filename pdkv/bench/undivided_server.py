"""An undivided worker behind the HTTP front that decode workers have: what a deployment's first tokens are set beside.

It takes what a router sends a decode worker, so the same client can ask both. Run as a module it is that worker.
"""

import asyncio
import contextlib
import secrets
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import AsyncIterator
from typing import NamedTuple

import httpx
import msgspec

from pdkv.daemons import http_server, lifeline, worker_api
from pdkv.daemons.config import DecodeConfig, ServedConfig, UpConfig, child_environment
from pdkv.daemons.front import run_worker
from pdkv.daemons.local import reserve_port
from pdkv.daemons.logs import configure_logging
from pdkv.errors import PdkvError

_MODULE = "pdkv.bench.undivided_server"
_ENGINE_MODULE = "pdkv.bench.undivided_process"
_START_S = 180.0
_POLL_S = 0.1
_END_S = 10.0


def headers(deadline_s: float) -> dict[str, str]:
    """What the router would add to one request. Of the prefill worker that they name nothing is wanted."""
    return {
        worker_api.TRANSFER: secrets.token_hex(16),
        worker_api.DEADLINE: f"{deadline_s:.3f}",
        worker_api.PREFILL_CONTROL: "tcp://127.0.0.1:0",
        worker_api.PREFILL_INCARNATION: "0",
    }


class UndividedWorker(NamedTuple):
    url: str
    admin_url: str


@contextlib.asynccontextmanager
async def undivided(up: UpConfig, threads: int) -> AsyncIterator[UndividedWorker]:
    """Start one that serves what the deployment ``up`` serves, and end it on leaving; yields it once it is ready.
    ``threads``: torch's. Raises ``PdkvError`` when it does not start."""
    with contextlib.ExitStack() as stack:
        address, admin = (
            str(http_server.bound_address(stack.enter_context(reserve_port("127.0.0.1", 0)))) for _ in range(2)
        )
        shared = up.model_dump(include=set(ServedConfig.model_fields), mode="json")
        config = {**shared, "listen": address, "admin_listen": admin, "reuse_port": True, "threads": threads}
        process = await asyncio.create_subprocess_exec(
            *lifeline.command(_MODULE, msgspec.json.encode(config).decode()),
            stdin=DEVNULL,
            env=child_environment(OMP_WAIT_POLICY="PASSIVE"),
        )
        try:
            await _until_ready(f"http://{address}", process)
            yield UndividedWorker(f"http://{address}", f"http://{admin}")
        finally:
            await _end(process)


async def _until_ready(url: str, process: Process) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_START_S), httpx.AsyncClient(trust_env=False) as client:
            while process.returncode is None:
                with contextlib.suppress(httpx.HTTPError):
                    if (await client.get(url + "/v1/models")).status_code == 200:  # its engine is there
                        return
                await asyncio.sleep(_POLL_S)
    raise PdkvError("the undivided worker does not start; its messages above say why")


async def _end(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
    try:
        async with asyncio.timeout(_END_S):
            await process.wait()
    except TimeoutError:
        process.kill()
        await process.wait()


def main() -> int:
    """Entry point: the configuration as JSON."""
    config = DecodeConfig.model_validate_json(sys.argv[1])
    configure_logging(config.log_level, "undivided", config.log_format)
    return asyncio.run(run_worker(config, _ENGINE_MODULE))


if __name__ == "__main__":
    sys.exit(main())
