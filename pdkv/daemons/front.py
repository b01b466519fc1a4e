"""The parent process of a worker: HTTP and tokenizer here, model and transport in the engine process below it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import structlog
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

import pdkv
from pdkv.daemons import http_server, openai_api, worker_api
from pdkv.daemons.admin import AdminDesk, create_admin_app
from pdkv.daemons.completion_answer import CompletionAnswer, failure
from pdkv.daemons.config import Address, PrefillConfig, WorkerConfig
from pdkv.daemons.engine_link import ENGINE_MODULE, EngineGoneError, EngineLink
from pdkv.daemons.health import WorkerHealth
from pdkv.daemons.lifecycle import Lifecycle, background
from pdkv.daemons.link import (
    DecodeJob,
    EngineReady,
    JobFailed,
    PrefillJob,
    Sampling,
    WorkerSettings,
)
from pdkv.daemons.openai_api import ApiError, CompletionRequest, DebugBlock
from pdkv.daemons.tokenization import TextCodec
from pdkv.daemons.traffic import Traffic
from pdkv.daemons.worker_metrics import WorkerMetrics
from pdkv.errors import FailureCode, RequestError
from pdkv.m3.config import load_config
from pdkv.metrics import Meter

_DEFAULT_MAX_MODEL_LEN = 32_768
_LONG_TEXT = 20_000
"""Characters above which a text is encoded outside the event loop, so that running streams do not stall."""
_log = structlog.get_logger(__name__)


class ServedModel(msgspec.Struct, frozen=True):
    """What the front itself knows of the model it serves."""

    name: str
    path: str
    vocab_size: int
    max_model_len: int
    codec: TextCodec | None

    @classmethod
    def load(cls, config: WorkerConfig) -> "ServedModel":
        """Read config.json and the tokenizer. Raises ModelError."""
        model = load_config(config.model)
        longest = config.max_model_len or min(model.max_position_embeddings, _DEFAULT_MAX_MODEL_LEN)
        name = config.served_model_name or config.model.resolve().name
        return cls(name, str(config.model), model.vocab_size, longest, TextCodec.load(config.model))


def engine_settings(config: WorkerConfig, served: ServedModel, listen: str) -> WorkerSettings:
    """The configuration as the engine process takes it. ``listen``: the HTTP address that was bound."""
    role = "prefill" if isinstance(config, PrefillConfig) else "decode"
    host = config.advertise_host or Address(config.control_listen).host
    return WorkerSettings(
        role=role,
        model_dir=str(config.model),
        name=f"{role}@{host}/{listen}",
        control_listen=f"tcp://{config.control_listen}",
        advertise_host=host,
        num_pages=config.num_pages,
        max_model_len=served.max_model_len,
        max_batch=config.max_batch,
        prefill_chunk=config.prefill_chunk,
        dtype=config.dtype,
        device=config.device,
        num_threads=config.threads,
        transport=config.transport,
        ucx_tls=config.ucx_tls,
        ucx_library=config.ucx_library,
        require_transport=config.require_transport,
        lease_ttl_s=config.lease_ttl_s,
        insecure=config.insecure,
        log_level=config.log_level,
    )


async def run_worker(config: WorkerConfig, engine_module: str = ENGINE_MODULE) -> int:
    """Run a worker until a signal or the end of its engine process; returns the exit code."""
    served = ServedModel.load(config)
    life = Lifecycle()
    meter = Meter()
    with (
        http_server.listen(Address(config.listen), reuse_port=config.reuse_port) as sock,
        http_server.listen(Address(config.admin_listen), reuse_port=config.reuse_port) as admin_sock,
        life.on_signals(),
    ):
        listen, admin = str(http_server.bound_address(sock)), str(http_server.bound_address(admin_sock))
        settings = engine_settings(config, served, listen)
        link = await EngineLink.start(settings, meter, engine_module)
        _log.info("loading", model=str(Path(config.model)), listen=listen, admin=admin)
        traffic = Traffic(settings.role, life, meter)
        health = WorkerHealth(link, life, config.stall_timeout)
        metrics = WorkerMetrics(link, health, meter, served.name)
        desk = AdminDesk(settings.role, health, life, traffic, metrics.collect)

        async def is_idle() -> bool:
            return traffic.in_flight == 0 and await _holds_nothing(link)

        try:
            async with (
                http_server.serving(create_admin_app(desk), admin_sock),
                background(
                    _end_with_engine(link, life), health.watch(), life.stop_when_drained(is_idle, config.drain_s)
                ),
            ):
                app = create_app(settings.role, served, link, health, traffic)
                await http_server.serve(app, sock, life, link.fail_all)
        finally:
            await link.close()
    return life.exit_code


async def _end_with_engine(link: EngineLink, life: Lifecycle) -> None:
    gone = await link.ended()
    _log.error(str(gone))
    life.stop(gone.exit_code or 1)


async def _holds_nothing(link: EngineLink) -> bool:
    """No page is leased to a peer or still written to; True also for an engine process that has not begun."""
    if link.ready is None:
        return True
    try:
        status = await link.status()
    except EngineGoneError:  # busy with a long step; one that has really ended ends the worker by itself
        return False
    return status.pages_free == status.pages_usable and status.leases_active == 0


def create_app(role: str, served: ServedModel, link: EngineLink, health: WorkerHealth, traffic: Traffic) -> FastAPI:
    """The HTTP surface of a worker. ``role``: "prefill" or "decode"."""
    front = _Front(role, served, link, health)
    app = http_server.create_app(traffic)
    app.add_api_route("/health", front.health, methods=["GET"])
    app.add_api_route("/v1/models", front.models, methods=["GET"])
    app.add_api_route(worker_api.INFO_PATH, front.info, methods=["GET"])
    app.add_api_route(worker_api.STATUS_PATH, front.status, methods=["GET"])
    if role == "prefill":
        app.add_api_route(worker_api.PREFILL_PATH, front.prefill, methods=["POST"])
    else:
        app.add_api_route(worker_api.COMPLETIONS_PATH, front.completions, methods=["POST"])
    return app


class _Front:
    def __init__(self, role: str, served: ServedModel, link: EngineLink, health: WorkerHealth) -> None:
        self._health = health
        self._role = role
        self._served = served
        self._link = link

    async def health(self, _request: Request) -> Response:
        return http_server.json_response(b'{"status":"live"}')

    async def models(self, _request: Request) -> Response:
        ready = self._ready()
        return http_server.json_response(openai_api.encode_models({self._served.name: ready.max_model_len}))

    async def info(self, _request: Request) -> Response:
        ready = self._link.ready
        problem = self._health.problem()
        info = worker_api.WorkerInfo(
            role=self._role, ready=not problem, problem=problem, model=self._served.name, version=pdkv.__version__
        )
        if ready is not None:
            info = msgspec.structs.replace(
                info,
                incarnation=f"{ready.incarnation:016x}",
                control=ready.control,
                manifest_digest=ready.manifest_digest,
                model_fingerprint=ready.model_fingerprint,
                max_model_len=ready.max_model_len,
                block_size=ready.block_size,
                num_pages=ready.num_pages,
                bytes_per_token=ready.bytes_per_token,
                num_regions=ready.num_regions,
                transport=ready.transport,
                regions=ready.regions,
            )
        return http_server.json_response(msgspec.json.encode(info))

    async def status(self, _request: Request) -> Response:
        self._ready()
        try:
            return http_server.json_response(msgspec.json.encode(await self._link.status()))
        except EngineGoneError as exc:
            raise ApiError.of(503, str(exc), code=FailureCode.SHUTDOWN.value) from exc

    async def prefill(self, request: Request) -> Response:
        """Answers when the prompt's state stands ready for the decode worker."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        if (
            request.headers.get(worker_api.PREFILL_INCARNATION, f"{ready.incarnation:016x}")
            != f"{ready.incarnation:016x}"
        ):
            raise ApiError.of(503, "this worker has restarted since the router chose it", code="stale_incarnation")
        structlog.contextvars.bind_contextvars(transfer=transfer.hex())
        asked, prompt = await self._read(request)
        openai_api.check_length(len(prompt), 1, ready.max_model_len)
        job = PrefillJob(transfer, prompt, _sampling(asked, transfer), deadline_s)
        with self._link.open(job) as events:
            event = await http_server.unless_gone(request, events.next())
        if isinstance(event, JobFailed):
            raise failure(event)
        return http_server.json_response(msgspec.json.encode(worker_api.Prefilled(len(prompt))))

    async def completions(self, request: Request) -> Response:
        """Answers, or begins to, when the first token is there; until then every failure has a status of its own."""
        ready = self._ready()
        transfer, deadline_s = _transfer(request), _deadline(request)
        control, incarnation = _prefill_peer(request)
        structlog.contextvars.bind_contextvars(transfer=transfer.hex())
        asked, prompt = await self._read(request)
        openai_api.check_length(len(prompt), asked.max_tokens, ready.max_model_len)
        job = DecodeJob(
            transfer=transfer,
            num_prompt_tokens=len(prompt),
            max_tokens=asked.max_tokens,
            sampling=_sampling(asked, transfer),
            ignore_eos=asked.ignore_eos,
            prefill_control=control,
            prefill_incarnation=incarnation,
            deadline_s=deadline_s,
        )
        debug = None
        if request.headers.get(worker_api.DEBUG) == "1":
            debug = DebugBlock(http_server.request_id(request), transfer.hex(), control, None)
        answer = CompletionAnswer(asked, self._served.name, self._served.codec, len(prompt), debug)
        with contextlib.ExitStack() as stack:
            events = stack.enter_context(self._link.open(job))
            first = await http_server.unless_gone(request, events.next())
            if isinstance(first, JobFailed):
                raise failure(first)
            if asked.stream:
                return _JobStream(answer.stream(first, events), stack.pop_all())
            return http_server.json_response(await http_server.unless_gone(request, answer.whole(first, events)))

    def _ready(self) -> EngineReady:
        if self._link.ready is None:
            raise ApiError.of(503, "the model is still loading", code="loading", retry_after_s=1)
        return self._link.ready

    async def _read(self, request: Request) -> tuple[CompletionRequest, list[int]]:
        """The request with its prompt as token ids that the model knows."""
        asked = openai_api.parse_completion(await http_server.read_body(request))
        openai_api.check_model(asked, (self._served.name, self._served.path))
        prompt = await self._encode(asked.prompt) if isinstance(asked.prompt, str) else asked.prompt
        openai_api.check_token_ids(prompt, self._served.vocab_size)
        return asked, prompt

    async def _encode(self, text: str) -> list[int]:
        codec = self._served.codec
        if codec is None:
            raise RequestError(
                f"the model {self._served.name!r} has no tokenizer.json; send 'prompt' as a list of token ids",
                param="prompt",
            )
        return codec.encode(text) if len(text) < _LONG_TEXT else await asyncio.to_thread(codec.encode, text)


class _JobStream(StreamingResponse):
    """A stream that ends its job even when the client goes before the first event was asked for."""

    def __init__(self, content: AsyncIterator[bytes], job: contextlib.ExitStack) -> None:
        super().__init__(content, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._job:
            await super().__call__(scope, receive, send)


def _sampling(asked: CompletionRequest, transfer: bytes) -> Sampling:
    """Both workers draw from the same seed, also when the client gave none."""
    seed = asked.seed if asked.seed is not None else int.from_bytes(transfer[:8], "little") >> 1
    return Sampling(asked.temperature, seed)


def _transfer(request: Request) -> bytes:
    with contextlib.suppress(ValueError):
        transfer = bytes.fromhex(request.headers.get(worker_api.TRANSFER, ""))
        if len(transfer) == 16:
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
