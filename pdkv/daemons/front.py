"""The parent process of a worker: HTTP and tokenizer here, model and transport in the engine process below it."""

from pathlib import Path

import msgspec
import structlog
from starlette.requests import Request
from starlette.responses import Response

import pdkv
from pdkv.daemons import http_server, openai_api, version, worker_api
from pdkv.daemons.admin import AdminDesk, create_admin_app
from pdkv.daemons.config import Address, DecodeConfig, PrefillConfig, WorkerConfig
from pdkv.daemons.control_keys import read_keys
from pdkv.daemons.engine_link import ENGINE_MODULE, EngineGoneError, EngineLink
from pdkv.daemons.health import WorkerHealth
from pdkv.daemons.job_routes import JobRoutes
from pdkv.daemons.lease_desk import LeaseDesk
from pdkv.daemons.lifecycle import Lifecycle, background
from pdkv.daemons.link import EngineReady, WorkerSettings
from pdkv.daemons.openai_api import ApiError
from pdkv.daemons.served_model import ServedModel
from pdkv.daemons.text_routes import TextRoutes
from pdkv.daemons.tracing import tracing
from pdkv.daemons.traffic import Traffic
from pdkv.daemons.worker_metrics import WorkerMetrics
from pdkv.errors import FailureCode
from pdkv.metrics import Meter
from pdkv.schema import VerifyPages

_log = structlog.get_logger(__name__)


def engine_settings(config: WorkerConfig, served: ServedModel, listen: str) -> WorkerSettings:
    """The configuration as the engine process takes it. ``listen``: the HTTP address that was bound."""
    role = _role(config)
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
        nvlink_blocks=config.nvlink_blocks,
        ucx_tls=config.ucx_tls,
        ucx_library=config.ucx_library,
        require_transport=config.require_transport,
        lease_ttl_s=config.lease_ttl_s,
        insecure=config.insecure,
        control_keys=str(config.control_keys or ""),
        log_level=config.log_level,
        tp_size=config.tp,
        expert_parallel=config.ep,
        kv_dtype=config.kv_dtype,
        index_dtype=config.index_dtype,
        index_topk_freq=config.index_topk_freq,
        index_topk_pattern=config.index_topk_pattern,
        index_skip_topk_offset=config.index_skip_topk_offset,
        prefix_cache=not (config.no_prefix_cache or config.batch_invariant),
        load_format=config.load_format,
        gpu_memory_utilization=config.gpu_memory_utilization,
        speculative_tokens=config.speculative_tokens if isinstance(config, DecodeConfig) else 0,
        batch_invariant=config.batch_invariant,
        max_pull_gbps=config.max_pull_gbps if isinstance(config, DecodeConfig) else 0.0,
        verify_pages=VerifyPages(config.verify_pages if isinstance(config, DecodeConfig) else "off"),
        layer_groups=config.layer_groups if isinstance(config, PrefillConfig) else 1,
    )


def _role(config: WorkerConfig) -> str:
    return "prefill" if isinstance(config, PrefillConfig) else "decode"


async def run_worker(config: WorkerConfig, engine_module: str = ENGINE_MODULE) -> int:
    """Run a worker until a signal or the end of its engine process; returns the exit code."""
    if config.control_keys is not None:
        read_keys(config.control_keys)  # the engine process does; here what is wrong is said at once
    served = ServedModel.load(config)
    life = Lifecycle()
    meter = Meter()
    with (
        http_server.listen(Address(config.listen), reuse_port=config.reuse_port) as sock,
        http_server.listen(Address(config.admin_listen), reuse_port=config.reuse_port) as admin_sock,
        life.on_signals(),
        tracing(_role(config)) as spans,
    ):
        listen, admin = str(http_server.bound_address(sock)), str(http_server.bound_address(admin_sock))
        settings = engine_settings(config, served, listen)
        link = await EngineLink.start(settings, meter, engine_module)
        _log.info("loading", model=str(Path(config.model)), listen=listen, admin=admin)
        traffic = Traffic(settings.role, life, meter, spans)
        health = WorkerHealth(link, life, config.stall_timeout)
        metrics = WorkerMetrics(link, health, meter, served.name)
        desk = AdminDesk(settings.role, health, life, traffic, metrics.collect, posts_from_here=not config.insecure)
        admin_app = create_admin_app(desk)
        if settings.role == "prefill":
            LeaseDesk(link).add_to(admin_app)

        async def is_idle() -> bool:
            return traffic.in_flight == 0 and await _holds_nothing(link)

        try:
            async with (
                http_server.serving(admin_app, admin_sock),
                background(
                    _end_with_engine(link, life), health.watch(), life.stop_when_drained(is_idle, config.drain_s)
                ),
            ):
                app = create_app(settings.role, admin, served, link, health, traffic)
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


def create_app(
    role: str, admin: str, served: ServedModel, link: EngineLink, health: WorkerHealth, traffic: Traffic
) -> http_server.App:
    """The HTTP surface of a worker. ``role``: "prefill" or "decode"; ``admin``: where its admin port listens."""
    front = _Front(role, admin, served, link, health)
    app = http_server.App(traffic)
    app.add_route("/health", front.health)
    app.add_route(version.PATH, version.show)
    app.add_route("/v1/models", front.models)
    app.add_route(worker_api.INFO_PATH, front.info)
    app.add_route(worker_api.STATUS_PATH, front.status)
    app.add_route(worker_api.MANIFEST_PATH, front.manifest)
    app.add_route(worker_api.TOKENIZE_PATH, front.texts.tokenize, "POST")
    app.add_route(worker_api.DETOKENIZE_PATH, front.texts.detokenize, "POST")
    app.add_route(worker_api.TOKENIZER_INFO_PATH, front.texts.tokenizer_info)
    for path, prefill_path in worker_api.PREFILL_PATHS.items():
        if role == "prefill":
            app.add_route(prefill_path, front.jobs.prefill, "POST")
        else:
            app.add_route(path, front.jobs.answer, "POST")
    return app


class _Front:
    def __init__(self, role: str, admin: str, served: ServedModel, link: EngineLink, health: WorkerHealth) -> None:
        self._health = health
        self._role = role
        self._admin = admin
        self._served = served
        self._link = link
        self.jobs = JobRoutes(served, link, self._ready)
        self.texts = TextRoutes(served)

    async def health(self, _request: Request) -> Response:
        return http_server.json_response(b'{"status":"live"}')

    async def models(self, _request: Request) -> Response:
        ready = self._ready()
        return http_server.json_response(openai_api.encode_models({self._served.name: ready.max_model_len}))

    async def info(self, _request: Request) -> Response:
        ready = self._link.ready
        problem = self._health.problem()
        info = worker_api.WorkerInfo(
            role=self._role,
            ready=not problem,
            problem=problem,
            admin=self._admin,
            model=self._served.name,
            version=pdkv.__version__,
            prompt_digest=self._served.prompt_digest,
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
                tp_size=ready.tp_size,
                num_pages=ready.num_pages,
                bytes_per_token=ready.bytes_per_token,
                num_regions=ready.num_regions,
                transport=ready.transport,
                control_key=ready.control_key,
                accepted_keys=ready.accepted_keys,
                regions=ready.regions,
            )
        return http_server.json_response(msgspec.json.encode(info))

    async def status(self, _request: Request) -> Response:
        self._ready()
        try:
            return http_server.json_response(msgspec.json.encode(await self._link.status()))
        except EngineGoneError as exc:
            raise ApiError.of(503, str(exc), code=FailureCode.SHUTDOWN.value) from exc

    async def manifest(self, _request: Request) -> Response:
        ready = self._ready()
        try:
            ranks = await self._link.manifests()
        except EngineGoneError as exc:
            raise ApiError.of(503, str(exc), code=FailureCode.SHUTDOWN.value) from exc
        document = worker_api.ManifestDocument(
            role=self._role,
            model=self._served.name,
            incarnation=f"{ready.incarnation:016x}",
            manifest_digest=ready.manifest_digest,
            prompt_digest=self._served.prompt_digest,
            ranks=list(ranks),
        )
        return http_server.json_response(msgspec.json.encode(document))

    def _ready(self) -> EngineReady:
        if self._link.ready is None:
            raise ApiError.of(503, "the model is still loading", code="loading", retry_after_s=1)
        return self._link.ready
