"""The one table of all metrics: name, kind, labels, and who exports it. ``pdkv metrics list`` prints it.

Labels are bounded: never a request, an address or a page. Every series also carries ``role``.
"""

from pdkv.errors import FailureCode, KeyRefusal
from pdkv.metrics import Kind, Label, Metric

PREFILL, DECODE, ROUTER = "prefill", "decode", "router"
WORKERS = (PREFILL, DECODE)
ALL = (PREFILL, DECODE, ROUTER)

FAILURES = tuple(code.value for code in FailureCode)
REFUSALS = (
    "bad_request",
    "body_too_large",
    "context_length_exceeded",
    "draining",
    "invalid_api_key",
    "loading",
    "model_not_found",
    "not_ready",
    "stale_incarnation",
    "upstream",
    "other",
)
"""Codes of refused requests that are no failures of a transfer. "upstream": told by a worker, passed on by the router.
"""
REQUEST_CODES = (*FAILURES, *REFUSALS)
NO_CODE = "none"
PATHS = ("rdma", "cuda_ipc", "shm", "tcp", "inproc", "unknown")
REGIONS = ("k", "v", "k_scale", "v_scale", "index_k")
STAGES = ("queued", "prefill", "transfer", "decode")

_PATH = Label("transport", PATHS)
_RESULT = Label("result", ("ok", "error"))
_UPSTREAM = Label("upstream", WORKERS)

_MILLISECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_MICROSECONDS = (10e-6, 25e-6, 50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 100e-3)
_HOPS = (50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3, 50e-3, 0.1, 0.25, 0.5, 1.0, 5.0, 30.0)
_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.85, 0.9, 0.95, 0.98, 0.99, 0.999, 1.0)
_MINUTES = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_POWERS = tuple(float(4**n) for n in range(10))
_SIZES = tuple(float(4**n << 16) for n in range(11))
"""64 KiB to 64 GiB."""


def _counter(name: str, about: str, roles: tuple[str, ...], *labels: Label) -> Metric:
    return Metric(name=name, kind=Kind.COUNTER, help=about, roles=roles, labels=labels)


def _gauge(name: str, about: str, roles: tuple[str, ...], *labels: Label) -> Metric:
    return Metric(name=name, kind=Kind.GAUGE, help=about, roles=roles, labels=labels)


def _histogram(name: str, about: str, roles: tuple[str, ...], buckets: tuple[float, ...], *labels: Label) -> Metric:
    return Metric(name=name, kind=Kind.HISTOGRAM, help=about, roles=roles, labels=labels, buckets=buckets)


# ---- who this is

BUILD_INFO = _gauge(
    "pdkv_build_info", "1; versions in the labels.", ALL, Label("version"), Label("python"), Label("torch")
)
ENGINE_INFO = _gauge(
    "pdkv_engine_info",
    "1; what is served. The manifest hash is equal on workers that may be paired.",
    WORKERS,
    Label("model"),
    Label("manifest_hash"),
    Label("block_size"),
    Label("tp_size"),
)
READY = _gauge("pdkv_ready", "1 while /readyz says so.", ALL)
LIVE = _gauge("pdkv_live", "1 while /livez says so.", ALL)
DRAINING = _gauge("pdkv_draining", "1 while no new request is taken.", ALL)
BEAT_AGE = _gauge(
    "pdkv_engine_beat_age_seconds",
    "Since a thread of the engine process last came round, as last heard.",
    WORKERS,
    Label("thread", ("engine", "agent")),
)

# ---- requests

REQUESTS = Metric(
    name="pdkv_requests_total",
    kind=Kind.COUNTER,
    help="Requests that have ended, by how.",
    roles=ALL,
    labels=(Label("result", ("ok", "error", "cancelled")), Label("code", (NO_CODE, *REQUEST_CODES))),
    only=(("ok", NO_CODE), ("cancelled", NO_CODE), *(("error", code) for code in REQUEST_CODES)),
)
REQUEST_SECONDS = _histogram(
    "pdkv_request_duration_seconds",
    "From a request's arrival to the end of its answer.",
    ALL,
    _MINUTES,
    Label("result", ("ok", "error", "cancelled")),
)
IN_FLIGHT = _gauge("pdkv_requests_in_flight", "Requests that have not been answered to the end.", ALL)
WAITING = _gauge("pdkv_requests_waiting", "Requests in the engine, by stage.", WORKERS, Label("stage", STAGES))
TIME_TO_FIRST_TOKEN = _histogram(
    "pdkv_time_to_first_token_seconds",
    "From a request's arrival to its first token; on the router to the first bytes of a stream.",
    (DECODE, ROUTER),
    _MINUTES,
)
INTER_TOKEN = _histogram("pdkv_inter_token_latency_seconds", "Between tokens of one answer.", (DECODE,), _MILLISECONDS)
QUEUE_SECONDS = _histogram("pdkv_queue_duration_seconds", "Waiting for pages.", WORKERS, _MINUTES)
PREFILL_SECONDS = _histogram(
    "pdkv_prefill_duration_seconds", "From a prompt's pages to its first token.", (PREFILL,), _MINUTES
)
PREFILLS_DISCARDED = _counter(
    "pdkv_prefills_discarded_total",
    "Prompts begun before decode asked, given up because it did not within a lease's time; begun anew if it does.",
    (PREFILL,),
)
PROMPT_TOKENS = _counter("pdkv_prompt_tokens_total", "Prompt tokens of accepted requests.", WORKERS)
GENERATION_TOKENS = _counter("pdkv_generation_tokens_total", "Tokens generated.", (DECODE,))
DRAFT_TOKENS = _counter(
    "pdkv_draft_tokens_total",
    "Tokens that prompt lookup proposed and a step verified, by how that ended.",
    (DECODE,),
    Label("result", ("accepted", "rejected")),
)

# ---- transfers

TRANSFER_SECONDS = _histogram(
    "pdkv_kv_transfer_duration_seconds",
    "From Acquire to the last byte or the failure.",
    (DECODE,),
    _MILLISECONDS,
    _PATH,
    _RESULT,
)
TRANSFER_READ_SECONDS = _histogram(
    "pdkv_kv_transfer_read_seconds", "Time of a transfer with a read outstanding.", (DECODE,), _MILLISECONDS, _PATH
)
TRANSFER_EXPOSED_SECONDS = _histogram(
    "pdkv_kv_transfer_exposed_seconds",
    "From the word that prefill is complete to the last byte.",
    (DECODE,),
    _HOPS,
    _PATH,
)
TRANSFER_OVERLAP = _histogram(
    "pdkv_kv_transfer_overlap_ratio",
    "Share of a transfer's bytes that had landed when prefill was complete.",
    (DECODE,),
    _SHARES,
    _PATH,
)
GRANTED_SECONDS = _histogram(
    "pdkv_kv_granted_seconds", "From Acquire to Granted, the wait for pages and the request included.", (DECODE,), _HOPS
)
FOLLOWED_SECONDS = _histogram(
    "pdkv_kv_watermark_to_post_seconds", "From a message that allows reads to their being posted.", (DECODE,), _HOPS
)
FIRST_STEP_SECONDS = _histogram(
    "pdkv_kv_first_step_seconds", "From a transfer's last byte to the first step that decodes it.", (DECODE,), _HOPS
)
PUBLISH_SECONDS = _histogram(
    "pdkv_kv_publish_seconds", "From the end of kernels that wrote pages to telling decode.", (PREFILL,), _HOPS
)
TRANSFER_BYTES = _counter(
    "pdkv_kv_transfer_bytes_total", "Bytes read from prefill workers.", (DECODE,), Label("region", REGIONS), _PATH
)
TRANSFER_SIZE = _histogram("pdkv_kv_transfer_size_bytes", "Bytes of one transfer.", (DECODE,), _SIZES, _PATH)
REGION_BYTES = _gauge(
    "pdkv_kv_region_bytes_per_token",
    "Bytes of a region a token, on one rank; bytes that are read keep the regions' ratio.",
    WORKERS,
    Label("region", REGIONS),
)
REGIONS_REGISTERED = _gauge(
    "pdkv_kv_regions_registered",
    "Regions (one a layer and head) that peers may read, or are read into, on one rank.",
    WORKERS,
    Label("region", REGIONS),
)
TRANSFER_POST_SECONDS = _histogram(
    "pdkv_kv_transfer_post_seconds", "Time to submit one batch of reads.", (DECODE,), _MICROSECONDS, _PATH
)
TRANSFER_DESCRIPTORS = _histogram(
    "pdkv_kv_transfer_descriptors", "Spans of one batch of reads.", (DECODE,), _POWERS, _PATH
)
TRANSFER_FAILURES = _counter(
    "pdkv_kv_transfer_failures_total", "Transfers that failed.", (DECODE,), _PATH, Label("code", FAILURES)
)
DIGEST_CHECKS = _counter(
    "pdkv_kv_digest_checks_total",
    "Digests of blocks of a region that were compared with prefill's, see --verify-pages.",
    (DECODE,),
    Label("region", REGIONS),
    Label("result", ("ok", "mismatch")),
)
DIGEST_SECONDS = _histogram(
    "pdkv_kv_digest_duration_seconds", "Time to digest a run of blocks, on the slowest rank.", WORKERS, _MILLISECONDS
)
LEASES_ACTIVE = _gauge("pdkv_kv_leases_active", "Transfers whose pages decode workers may read.", (PREFILL,))
LEASES_EXPIRED = _counter("pdkv_kv_leases_expired_total", "Leases that ended by time instead of release.", (PREFILL,))
LEASE_AGE = _histogram("pdkv_kv_lease_age_seconds", "From the grant of pages to the lease's end.", (PREFILL,), _MINUTES)
OLDEST_LEASE = _gauge(
    "pdkv_kv_oldest_lease_age_seconds", "Since the pages of the oldest lease were granted; 0 without one.", (PREFILL,)
)
BLOCKS_STRANDED = _gauge(
    "pdkv_kv_blocks_stranded",
    "Pages of transfers that failed, kept until nothing can read or write them any more.",
    WORKERS,
)
READS_OUTSTANDING = _gauge("pdkv_kv_reads_outstanding", "Batches of reads that have not ended.", (DECODE,))

# ---- memory

BLOCKS_TOTAL = _gauge("pdkv_kv_blocks_total", "Pages for blocks of requests.", WORKERS)
BLOCKS_USED = _gauge("pdkv_kv_blocks_used", "Pages in use; those that are only kept for later are not.", WORKERS)
CACHE_USAGE = _gauge("pdkv_kv_cache_usage_ratio", "Pages in use / pages.", WORKERS)
PREFIX_BLOCKS = _counter(
    "pdkv_prefix_cache_blocks_total",
    "Full blocks of prompts that got their pages, by whether their state was here already.",
    WORKERS,
    Label("result", ("hit", "miss")),
)
PREFIX_PAGES = _gauge(
    "pdkv_prefix_cache_pages", "Pages that requests which begin alike can share, in use or not.", WORKERS
)
PREFIX_EVICTIONS = _counter(
    "pdkv_prefix_cache_evictions_total", "Pages that were kept and were given up to make room.", WORKERS
)

# ---- peers

HANDSHAKES = Metric(
    name="pdkv_handshakes_total",
    kind=Kind.COUNTER,
    help="Handshakes of prefill and decode workers, by how they ended.",
    roles=WORKERS,
    labels=(_RESULT, Label("code", (NO_CODE, *FAILURES))),
    only=(("ok", NO_CODE), *(("error", code) for code in FAILURES)),
)
HANDSHAKE_SECONDS = _histogram(
    "pdkv_handshake_duration_seconds", "From Hello to a path that is proved.", (DECODE,), _MILLISECONDS
)
PEERS = _gauge(
    "pdkv_peers", "Workers of the other role with a handshake behind them, heard of in the last 65 s.", WORKERS
)
PEER_SILENCE = _gauge(
    "pdkv_peer_silence_seconds",
    "Since that peer which has been silent longest said anything; it is asked every 20 s, and given up at 65 s.",
    WORKERS,
)
PEER_LOSSES = _counter(
    "pdkv_peer_losses_total", "Peers that had been ready and are gone, by why.", WORKERS, Label("code", FAILURES)
)
INCARNATION_CHANGES = _counter(
    "pdkv_peer_incarnation_changes_total", "Peers that came again with another incarnation: restarts.", WORKERS
)
TRANSPORT_SELECTED = _gauge("pdkv_transport_selected", "Prefill workers that are read over a path.", (DECODE,), _PATH)
TRANSPORT_STAGED = _gauge(
    "pdkv_transport_staged",
    "Prefill workers whose reads are staged through pinned host memory: GPU memory over TCP.",
    (DECODE,),
)
MESSAGES_DROPPED = _counter(
    "pdkv_control_messages_dropped_total", "Control messages that could not be obeyed.", WORKERS
)
CONTROL_REFUSED = _counter(
    "pdkv_control_refused_total",
    "Connections of the control channel that keys have kept from standing, or that broke off in the handshake.",
    WORKERS,
    Label("reason", tuple(reason.value for reason in KeyRefusal)),
)

# ---- router

DECISIONS = _counter(
    "pdkv_router_route_decisions_total",
    "Choices of a pair of workers, new tries included.",
    (ROUTER,),
    Label("decision", ("pd", "rejected")),
)
RETRIES = _counter("pdkv_router_retries_total", "Tries after the first.", (ROUTER,))
UPSTREAM_RESPONSES = _counter(
    "pdkv_router_upstream_responses_total",
    "Answers of workers by class of status; lost: the connection broke.",
    (ROUTER,),
    _UPSTREAM,
    Label("status", ("2xx", "4xx", "5xx", "lost")),
)
WORKERS_READY = _gauge("pdkv_router_workers_ready", "Workers that may be chosen.", (ROUTER,), _UPSTREAM)
CIRCUITS = _gauge(
    "pdkv_router_circuits",
    "Workers by their circuit. closed: in use; slow: used where no other is at hand; open: not used until it answers.",
    (ROUTER,),
    _UPSTREAM,
    Label("state", ("closed", "slow", "open")),
)
CIRCUITS_OPENED = _counter(
    "pdkv_router_circuits_opened_total",
    "Workers taken out of use: failed a request, do not answer, drain.",
    (ROUTER,),
    _UPSTREAM,
)
WORKER_RESTARTS = _counter(
    "pdkv_router_worker_restarts_total",
    "Workers that came again at the same address with another incarnation.",
    (ROUTER,),
    _UPSTREAM,
)
CERTIFICATE_EXPIRY = _gauge(
    "pdkv_router_certificate_expiry_timestamp_seconds",
    "When the certificate that clients see ends, in seconds since 1970; 0 without TLS.",
    (ROUTER,),
)

TABLE: tuple[Metric, ...] = tuple(value for value in list(vars().values()) if isinstance(value, Metric))


def exported_by(role: str) -> tuple[Metric, ...]:
    """The metrics of one role, in the table's order."""
    return tuple(metric for metric in TABLE if role in metric.roles)
