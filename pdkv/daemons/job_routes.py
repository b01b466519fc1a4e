"""The two requests that a router sends workers for one completion: to P to prefill, to D to answer."""

import contextlib
from collections.abc import AsyncIterator, Callable
from hashlib import blake2b

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from pdkv.daemons import completion_request, http_server, worker_api
from pdkv.daemons.choice import EncodedPrompt
from pdkv.daemons.completion_answer import CompletionAnswer, failure
from pdkv.daemons.completion_request import CompletionRequest
from pdkv.daemons.engine_link import EngineLink
from pdkv.daemons.job_group import open_jobs
from pdkv.daemons.link import DecodeJob, EngineReady, JobFailed, PrefillJob, Sampling
from pdkv.daemons.openai_api import ApiError, DebugBlock
from pdkv.daemons.served_model import ServedModel
from pdkv.errors import RequestError

_TRANSFER_BYTES = 16


def transfer_of_prompt(transfer: bytes, index: int) -> bytes:
    """The transfer id of one prompt of a request; P and D derive it alike, for the router draws one id a request.

    The first prompt's is the request's own.
    """
    if index == 0:
        return transfer
    return blake2b(transfer + index.to_bytes(4, "big"), digest_size=_TRANSFER_BYTES).digest()


class JobRoutes:
    """Handlers of a worker's front. ``ready`` gives the loaded engine or raises ApiError."""

    def __init__(self, served: ServedModel, link: EngineLink, ready: Callable[[], EngineReady]) -> None:
        self._served = served
        self._link = link
        self._ready = ready

    async def prefill(self, request: Request) -> Response:
        """Answers when the state of every prompt stands ready for the decode worker."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        ours = f"{ready.incarnation:016x}"
        if request.headers.get(worker_api.PREFILL_INCARNATION, ours) != ours:
            raise ApiError.of(503, "this worker has restarted since the router chose it", code="stale_incarnation")
        structlog.contextvars.bind_contextvars(transfer=transfer.hex())
        asked, prompts = await self._read(request, ready)
        jobs = [
            PrefillJob(
                transfer=(own := transfer_of_prompt(transfer, index)),
                prompt=prompt.token_ids,
                sampling=_sampling(asked, own),
                deadline_s=deadline_s,
                num_top=asked.logprobs or 0,
                prompt_top=asked.prompt_logprobs,
            )
            for index, prompt in enumerate(prompts)
        ]
        with open_jobs(self._link, jobs) as group:
            for _ in jobs:
                _, event = await http_server.unless_gone(request, group.next())
                if isinstance(event, JobFailed):
                    raise failure(event)
        num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        return http_server.json_response(msgspec.json.encode(worker_api.Prefilled(num_tokens)))

    async def completions(self, request: Request) -> Response:
        """Answers, or begins to, when the first token is there; until then every failure has a status of its own."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        control, incarnation = _prefill_peer(request)
        structlog.contextvars.bind_contextvars(transfer=transfer.hex())
        asked, prompts = await self._read(request, ready)
        jobs = [
            DecodeJob(
                transfer=(own := transfer_of_prompt(transfer, index)),
                prompt=prompt.token_ids,
                max_tokens=max(1, asked.max_tokens),  # P's first token comes anyway; asked for none, none is shown
                sampling=_sampling(asked, own),
                ignore_eos=asked.ignore_eos,
                prefill_control=control,
                prefill_incarnation=incarnation,
                deadline_s=deadline_s,
                num_top=asked.logprobs or 0,
                prompt_top=asked.prompt_logprobs,
            )
            for index, prompt in enumerate(prompts)
        ]
        debug = None
        if request.headers.get(worker_api.DEBUG) == "1":
            debug = DebugBlock(http_server.request_id(request), transfer.hex(), control, None)
        answer = CompletionAnswer(asked, self._served.name, self._served.codec, prompts, debug)
        with contextlib.ExitStack() as stack:
            group = stack.enter_context(open_jobs(self._link, jobs))
            first = await http_server.unless_gone(request, group.next())
            if isinstance(first[1], JobFailed):
                raise failure(first[1])
            if asked.stream:
                return _JobStream(answer.stream(first, group), stack.pop_all())
            return http_server.json_response(await http_server.unless_gone(request, answer.whole(first, group)))

    async def _read(self, request: Request, ready: EngineReady) -> tuple[CompletionRequest, list[EncodedPrompt]]:
        """The request, with prompts that the model knows and that fit. Both roles refuse the same in the same words."""
        served = self._served
        asked = completion_request.parse_completion(await http_server.read_body(request))
        completion_request.check_model(asked.model, served.names)
        completion_request.check_num_prompts(asked, served.max_prompts)
        if asked.stop:
            served.need_codec("stop", "stop strings cannot be found in its answers")
        prompts = await served.encode(asked.prompts, offsets=asked.prompt_logprobs is not None)
        for prompt in prompts:
            completion_request.check_token_ids(prompt.token_ids, served.vocab_size)
            completion_request.check_length(len(prompt.token_ids), max(1, asked.max_tokens), ready.max_model_len)
        completion_request.check_prompt_logprobs(asked, sum(len(prompt.token_ids) for prompt in prompts))
        return asked, prompts


class _JobStream(StreamingResponse):
    """A stream that ends its jobs even when the client goes before the first event was asked for."""

    def __init__(self, content: AsyncIterator[bytes], jobs: contextlib.ExitStack) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._jobs = jobs

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._jobs:
            await super().__call__(scope, receive, send)


def _sampling(asked: CompletionRequest, transfer: bytes) -> Sampling:
    """Both workers draw from the same seed, also when the client gave none."""
    seed = asked.seed if asked.seed is not None else int.from_bytes(transfer[:8], "little") >> 1
    return Sampling(asked.temperature, seed, asked.top_p)


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
