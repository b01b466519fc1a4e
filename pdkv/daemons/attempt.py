"""One try of one request: P and D asked at once under a new transfer id, and how the pair of answers is judged."""

import asyncio
import contextlib
import secrets
from collections.abc import Mapping

import msgspec
import structlog

from pdkv.daemons.openai_api import ApiError
from pdkv.daemons.router_metrics import RouterMetrics
from pdkv.daemons.traffic import current_span
from pdkv.daemons.worker_api import (
    DEADLINE,
    PREFILL_CONTROL,
    PREFILL_INCARNATION,
    PREFILL_PATHS,
    TRANSFER,
)
from pdkv.daemons.worker_client import WorkerAnswer, WorkerClient, WorkerLostError
from pdkv.daemons.worker_pool import Pair

_DECODE_REFUSAL_S = 0.5
"""D's own refusal of a request is waited for this long after P's, because D's says more."""
_PREFILL_END_S = 5.0
"""In which P's answer must end once D's has: both are told of the end of the same transfer, by ways of their own."""
_log = structlog.get_logger(__name__)


class Asked(msgspec.Struct, frozen=True):
    """A client's request, as workers get it."""

    path: str
    """One of ``PREFILL_PATHS``."""
    body: bytes
    headers: dict[str, str]


class AttemptFailedError(Exception):
    """A try that another one may do better than. ``error`` is what the client gets if none does."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(str(error))
        self.error = error


class Upstream:
    """D's answer, its headers here and its body still to be read, with P's request beside it. Close it."""

    def __init__(self, decode: WorkerAnswer, prefill: asyncio.Task[WorkerAnswer]) -> None:
        self.decode = decode
        self._prefill = prefill
        self._is_complete = False

    @property
    def is_stream(self) -> bool:
        return self.decode.header("content-type").startswith("text/event-stream")

    async def read(self) -> bytes:
        """The whole body. Raises AttemptFailedError when D's connection breaks on the way."""
        try:
            body = await self.decode.read()
        except WorkerLostError as exc:
            raise _lost("decode", exc) from exc
        if self.decode.status == 200:
            self.complete()
        return body

    def complete(self) -> None:
        """D has answered in full: so P has computed, and its answer is here or on its way."""
        self._is_complete = True

    async def close(self) -> None:
        """Drop both connections; a worker that is still at the request hears of it and ends the job.

        Of a request that is complete P's answer is read to its end by and by, so that the next one finds a connection.
        """
        if self._is_complete:
            _let_end(self._prefill)
        else:
            self._prefill.cancel()
            await asyncio.gather(self._prefill, return_exceptions=True)
        self.decode.close()


async def attempt(
    client: WorkerClient,
    metrics: RouterMetrics,
    pair: Pair,
    asked: Asked,
    seconds_left: float,
) -> Upstream:
    """Ask both workers; returns when D has begun to answer, be it with a refusal that the client should see.

    Raises AttemptFailedError when either side fails before that. When it raises, or is cancelled, both requests have
    been dropped.
    """
    transfer = secrets.token_hex(16)
    common = {
        **asked.headers,
        "content-type": "application/json",
        TRANSFER: transfer,
        DEADLINE: f"{seconds_left:.3f}",
        PREFILL_CONTROL: pair.prefill_control,
        PREFILL_INCARNATION: pair.prefill_incarnation,
    }
    structlog.contextvars.bind_contextvars(transfer=transfer)
    if (span := current_span()) is not None:
        span.note({"pdkv.transfer": transfer, "pdkv.prefill": pair.prefill.url, "pdkv.decode": pair.decode.url})
    upstream = _Workers(client, metrics, asked.body, common)
    # P first: if it is idle it computes as soon as it knows the prompt, and D has until its first pages are complete.
    prefill = asyncio.create_task(_prefill(upstream, pair.prefill.url + PREFILL_PATHS[asked.path]))
    decode = asyncio.create_task(upstream.post("decode", pair.decode.url + asked.path))
    try:
        await asyncio.sleep(0)  # both leave first
        _log.info("asking", prefill=pair.prefill.url, decode=pair.decode.url)
        answer = await _judge(decode, prefill)
        if not decode.done():
            await _drop(decode)
    except BaseException:
        await _drop(decode, prefill)
        raise
    return Upstream(answer, prefill)


def _let_end(request: asyncio.Task[WorkerAnswer]) -> None:
    """Nobody waits for it. Until it has ended the timer holds it, and ends it if need be."""
    timer = asyncio.get_running_loop().call_later(_PREFILL_END_S, request.cancel)

    def ended(request: asyncio.Task[WorkerAnswer]) -> None:
        timer.cancel()
        if not request.cancelled():
            request.exception()  # or asyncio logs that nobody asked for it

    request.add_done_callback(ended)


async def _drop(*requests: asyncio.Task[WorkerAnswer]) -> None:
    for request in requests:
        request.cancel()
    for result in await asyncio.gather(*requests, return_exceptions=True):
        if not isinstance(result, BaseException):
            result.close()


async def _judge(decode: asyncio.Task[WorkerAnswer], prefill: asyncio.Task[WorkerAnswer]) -> WorkerAnswer:
    """The answer to give. Once D has begun to answer, what becomes of P's own answer does not matter."""
    await asyncio.wait((decode, prefill), return_when=asyncio.FIRST_COMPLETED)
    if not decode.done():
        refused = _refusal(prefill.result())
        if refused is not None:
            with contextlib.suppress(TimeoutError, AttemptFailedError):
                async with asyncio.timeout(_DECODE_REFUSAL_S):
                    return await _checked(asyncio.shield(decode), "decode")
            return refused
    return await _checked(decode, "decode")


async def _checked(pending: "asyncio.Future[WorkerAnswer]", side: str) -> WorkerAnswer:
    return await _pass_or_fail(await pending, side)


async def _prefill(upstream: "_Workers", url: str) -> WorkerAnswer:
    response = await _pass_or_fail(await upstream.post("prefill", url), "prefill")
    try:
        await response.read()
    except WorkerLostError as exc:
        raise _lost("prefill", exc) from exc
    finally:
        response.close()
    return response


class _Workers:
    """Puts one request to both workers."""

    def __init__(self, client: WorkerClient, metrics: RouterMetrics, body: bytes, headers: Mapping[str, str]) -> None:
        self._client = client
        self._metrics = metrics
        self._body = body
        self._headers = headers

    async def post(self, side: str, url: str) -> WorkerAnswer:
        """The answer, its body still to be read. Raises AttemptFailedError when there is none."""
        try:
            response = await self._client.post(url, self._body, self._headers)
        except WorkerLostError as exc:
            self._metrics.lost(side)
            raise _lost(side, exc) from exc
        self._metrics.answered(side, response.status)
        return response


async def _pass_or_fail(response: WorkerAnswer, side: str) -> WorkerAnswer:
    """The response, unless another try may do better: every 5xx but a deadline that has passed, and 429."""
    status = response.status
    if status in {200, 504} or (400 <= status < 500 and status != 429):
        return response
    try:
        body = await response.read()
    except WorkerLostError as exc:
        raise _lost(side, exc) from exc
    finally:
        response.close()
    raise AttemptFailedError(ApiError.decode(status, body, response.header("retry-after")))


def _refusal(prefill: WorkerAnswer) -> WorkerAnswer | None:
    return prefill if prefill.status != 200 else None


def _lost(side: str, exc: WorkerLostError) -> AttemptFailedError:
    return AttemptFailedError(
        ApiError.of(502, f"the {side} worker was lost before it answered ({exc})", code="peer_lost", retry_after_s=1)
    )
