"""The two requests that a router sends workers for one answer: to P to prefill, to D to answer.

Which API the client spoke matters at the edges alone: its endpoint reads the body and writes the answer.
"""

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from hashlib import blake2b
from typing import Protocol

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pdkv.daemons import http_server, worker_api
from pdkv.daemons.answer import Answer, AnswerForm, failure
from pdkv.daemons.chat_endpoint import ChatEndpoint
from pdkv.daemons.completion_endpoint import CompletionEndpoint
from pdkv.daemons.engine_link import EngineLink
from pdkv.daemons.generation import Generation, Options
from pdkv.daemons.job_group import open_jobs
from pdkv.daemons.link import DecodeJob, EngineReady, JobFailed, PrefillJob, Sampling
from pdkv.daemons.openai_api import ApiError, DebugBlock
from pdkv.daemons.served_model import ServedModel
from pdkv.daemons.traffic import current_span
from pdkv.errors import RequestError

_TRANSFER_BYTES = 16
_LAST_TIME = 2.0**37
"""Beyond it no calendar of ours reaches."""


def transfer_of_choice(transfer: bytes, index: int) -> bytes:
    """The transfer id of one choice of a request; P and D derive it alike, for the router draws one id a request.

    The first choice's is the request's own.
    """
    if index == 0:
        return transfer
    return blake2b(transfer + index.to_bytes(4, "big"), digest_size=_TRANSFER_BYTES).digest()


class Endpoint(Protocol):
    """An API's edge."""

    async def read(self, body: bytes, max_model_len: int, at: float) -> Generation:
        """What a client's body asks of the engine. ``at``: the request's time, in seconds since 1970.

        Raises RequestError, on P and D in the same words.
        """
        ...

    def form(self, asked: Generation) -> AnswerForm:
        """The form of the answer to it."""
        ...


class JobRoutes:
    """Handlers of a worker's front. ``ready`` gives the loaded engine or raises ApiError."""

    def __init__(self, served: ServedModel, link: EngineLink, ready: Callable[[], EngineReady]) -> None:
        endpoints: dict[str, Endpoint] = {
            worker_api.COMPLETIONS_PATH: CompletionEndpoint(served),
            worker_api.CHAT_PATH: ChatEndpoint(served),
        }
        self._endpoints = endpoints | {worker_api.PREFILL_PATHS[path]: one for path, one in endpoints.items()}
        self._codec = served.codec
        self._link = link
        self._ready = ready

    async def prefill(self, request: Request) -> Response:
        """Answers when the state of every choice's prompt stands ready for the decode worker."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        ours = f"{ready.incarnation:016x}"
        if request.headers.get(worker_api.PREFILL_INCARNATION, ours) != ours:
            raise ApiError.of(503, "this worker has restarted since the router chose it", code="stale_incarnation")
        _tell_transfer(transfer)
        _, asked = await self._read(request, ready)
        jobs = [
            PrefillJob(
                transfer=(own := transfer_of_choice(transfer, index)),
                prompt=asked.prompt_of(index).token_ids,
                sampling=_sampling(asked.options, own, index),
                deadline_s=deadline_s,
                num_top=asked.options.logprobs or 0,
                prompt_top=asked.options.prompt_logprobs,
            )
            for index in range(asked.num_choices)
        ]
        with open_jobs(self._link, jobs) as group:
            async with http_server.unless_gone(request):
                for _ in jobs:
                    _, event = await group.next()
                    if isinstance(event, JobFailed):
                        raise failure(event)
        num_tokens = sum(len(prompt.token_ids) for prompt in asked.prompts)
        if (span := current_span()) is not None:
            span.note({"gen_ai.usage.input_tokens": num_tokens})
        return http_server.json_response(msgspec.json.encode(worker_api.Prefilled(num_tokens)))

    async def answer(self, request: Request) -> Response:
        """Answers, or begins to, when the first token is there; until then every failure has a status of its own."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        control, incarnation = _prefill_peer(request)
        _tell_transfer(transfer)
        endpoint, asked = await self._read(request, ready)
        options = asked.options
        jobs = [
            DecodeJob(
                transfer=(own := transfer_of_choice(transfer, index)),
                prompt=asked.prompt_of(index).token_ids,
                max_tokens=max(1, asked.max_tokens),  # P's first token comes anyway; asked for none, none is shown
                sampling=_sampling(options, own, index),
                ignore_eos=options.ignore_eos,
                prefill_control=control,
                prefill_incarnation=incarnation,
                deadline_s=deadline_s,
                num_top=options.logprobs or 0,
                prompt_top=options.prompt_logprobs,
            )
            for index in range(asked.num_choices)
        ]
        debug = None
        if request.headers.get(worker_api.DEBUG) == "1":
            debug = DebugBlock(http_server.request_id(request), transfer.hex(), control, None)
        answer = Answer(asked, endpoint.form(asked), self._codec, debug)
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(open_jobs(self._link, jobs))
            async with http_server.unless_gone(request):
                first = await group.next()
                if isinstance(first[1], JobFailed):
                    raise failure(first[1])
                if not options.stream:
                    return http_server.json_response(await answer.whole(first, group))
            return _JobStream(answer.stream(first, group), stack.pop_all())

    async def _read(self, request: Request, ready: EngineReady) -> tuple[Endpoint, Generation]:
        endpoint = self._endpoints[request.scope["path"]]
        body = await http_server.read_body(request)
        return endpoint, await endpoint.read(body, ready.max_model_len, _asked_at(request))


class _JobStream(http_server.EventStream):
    """A stream that ends its jobs even when the client goes before the first event was asked for."""

    def __init__(self, events: AsyncGenerator[bytes, None], jobs: contextlib.ExitStack) -> None:
        super().__init__(events)
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._jobs:
            await super().__call__(scope, receive, send)


def _tell_transfer(transfer: bytes) -> None:
    """Log lines and the span of the request are found by it."""
    structlog.contextvars.bind_contextvars(transfer=transfer.hex())
    if (span := current_span()) is not None:
        span.note({"pdkv.transfer": transfer.hex()})


def _sampling(options: Options, transfer: bytes, index: int) -> Sampling:
    """Both workers draw from the same seed, also when the client gave none. Choices of one prompt differ in theirs."""
    if options.seed is None:
        seed = int.from_bytes(transfer[:8], "little") >> 1
    elif (which := index % options.n) == 0:
        seed = options.seed
    else:
        drawn = blake2b(options.seed.to_bytes(8, "big", signed=True) + which.to_bytes(4, "big"), digest_size=8)
        seed = int.from_bytes(drawn.digest(), "little") >> 1
    return Sampling(options.temperature, seed, options.top_p)


def _asked_at(request: Request) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(request.headers.get(worker_api.ASKED_AT, time.time()))
        if 0 <= seconds < _LAST_TIME:
            return seconds
    raise RequestError(f"the header {worker_api.ASKED_AT} must hold seconds since 1970")


def _transfer(request: Request) -> bytes:
    with contextlib.suppress(ValueError):
        transfer = bytes.fromhex(request.headers.get(worker_api.TRANSFER, ""))
        if len(transfer) == _TRANSFER_BYTES:
            return transfer
    raise RequestError(
        f"the header {worker_api.TRANSFER} is missing or not 32 hex digits: this is a worker of a pdkv deployment; "
        "send requests to its router"
    )


def _deadline(request: Request) -> float:
    with contextlib.suppress(ValueError):
        seconds = float(request.headers.get(worker_api.DEADLINE, ""))
        if 0 < seconds < float("inf"):
            return seconds
    raise RequestError(f"the header {worker_api.DEADLINE} must hold the seconds that are left, a number above 0")


def _prefill_peer(request: Request) -> tuple[str, int]:
    control = request.headers.get(worker_api.PREFILL_CONTROL, "")
    with contextlib.suppress(ValueError):
        incarnation = int(request.headers.get(worker_api.PREFILL_INCARNATION, ""), 16)
        if control.startswith("tcp://") and 0 <= incarnation < 2**64:
            return control, incarnation
    raise RequestError(
        f"the headers {worker_api.PREFILL_CONTROL} and {worker_api.PREFILL_INCARNATION} must name a prefill worker: "
        "this is a decode worker; send requests to the router"
    )
