"""One request through a deployment that is started for it and ended after it."""

import asyncio
import time
from typing import NamedTuple

import httpx
import msgspec

from pdkv.daemons.config import UpConfig
from pdkv.daemons.local import deployed, print_to_stderr
from pdkv.daemons.openai_api import ApiError, Completion
from pdkv.errors import PdkvError


class LocalAnswer(NamedTuple):
    completion: Completion
    """With ``token_ids`` and the ``pdkv`` block."""
    seconds: float
    """From sending the request to the end of its answer."""


class RequestFailedError(PdkvError):
    """The deployment answered with an error."""


def ask(config: UpConfig, body: dict[str, object]) -> LocalAnswer:
    """Start the deployment, send it one completions request, and end it."""
    return asyncio.run(_ask(config, body))


async def _ask(config: UpConfig, body: dict[str, object]) -> LocalAnswer:
    async with (
        deployed(config, print_to_stderr) as deployment,
        httpx.AsyncClient(trust_env=False, timeout=config.request_timeout + 10) as client,
    ):
        started = time.perf_counter()
        response = await client.post(
            deployment.url + "/v1/completions",
            json={**body, "return_token_ids": True},
            headers={"X-Pdkv-Debug": "1"},
        )
        seconds = time.perf_counter() - started
    if response.status_code != 200:
        error = ApiError.decode(response.status_code, response.content, None)
        raise RequestFailedError(f"{error} (HTTP {response.status_code})")
    return LocalAnswer(msgspec.json.decode(response.content, type=Completion), seconds)


def token_ids(answer: LocalAnswer) -> list[int]:
    """The generated ids."""
    ids = answer.completion.choices[0].token_ids
    assert ids is not msgspec.UNSET, "the request asked for them"
    return list(ids)
