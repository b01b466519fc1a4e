"""What a worker's HTTP front and its engine process say to each other, and the socket pair that carries it.

A worker is two processes: the front (HTTP, tokenizer, no torch) is the parent, the engine process (model, agent,
transport) its child. Each dies when the other does: the end of the socket pair is the signal.
"""

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator
from itertools import groupby
from operator import itemgetter

import msgspec

from pdkv.m3.logprobs import PromptLogprobs, TopLogprobs, Tops
from pdkv.metrics import Series
from pdkv.schema import Manifest, VerifyPages

MAX_FRAME_BYTES = 256 << 20
_LENGTH = struct.Struct("<I")


class WorkerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """All that the engine process needs to know; the first frame it receives. The front has validated it."""

    role: str
    """"prefill" or "decode"."""
    model_dir: str
    name: str
    """Tells this worker from others, and is the same after a restart: peers end its old life by it."""
    control_listen: str
    """zmq endpoint that decode workers' control messages reach, "tcp://127.0.0.1:0" for any port. Unused by decode."""
    advertise_host: str
    num_pages: int
    """Pages of the arena, the probe's two included; 0 = sized from ``max_model_len`` and ``max_batch``."""
    max_model_len: int
    max_batch: int
    prefill_chunk: int
    """Prompt tokens of one step; 0 = as the device has room for."""
    dtype: str
    device: str
    num_threads: int
    """torch threads; 0 = all cores."""
    transport: str
    """"auto", "nixl", "nvlink", "shm", "sockets", "ucx"."""
    ucx_tls: str | None
    ucx_library: str | None
    require_transport: str | None
    nvlink_blocks: int = 64
    """Most thread blocks that gather short spans of a peer's GPU memory."""
    lease_ttl_s: float
    insecure: bool
    """Allows ``control_listen`` on an address that is not loopback although messages are not authenticated."""
    control_keys: str = ""
    """Folder of the control channel's keys, which are read where they are used; empty: no keys."""
    log_level: str
    tp_size: int = 1
    """Rank processes of this worker."""
    expert_parallel: bool = False
    """Ranks hold whole experts instead of a slice of each."""
    kv_dtype: str = "auto"
    """What K/V is stored in: "auto" (``dtype``), a float's name, or fp8, fp8_unit, fp8_e5m2."""
    index_dtype: str = "auto"
    """What index keys are stored in: "auto" (``dtype``), a float's name, or fp8."""
    index_topk_freq: int = 0
    """Sparse layers between computed selections; 0 = as the checkpoint's config says."""
    index_topk_pattern: str = ""
    index_skip_topk_offset: int = 0
    prefix_cache: bool = True
    load_format: str = "auto"
    """"auto": the checkpoint's weights; "dummy": random ones in the shapes of its config."""
    gpu_memory_utilization: float = 0.9
    """Share of each GPU's memory that this worker may fill, weights and work space included."""
    speculative_tokens: int = 0
    """Tokens that decode proposes by prompt lookup and verifies in one step; 0 = none."""
    batch_invariant: bool = False
    """What is computed of a request hangs on no other. Without prefix cache and proposals, one rank on a GPU."""
    layer_groups: int = 4
    """Parts in which prefill tells of the layers of a prompt's last chunk."""
    max_pull_gbps: float = 0.0
    """Most gigabytes a second that decode reads from all its peers, over all ranks; 0 = no limit."""
    verify_pages: VerifyPages = VerifyPages.OFF
    """Of what decode reads, how much it compares by digests before it answers from it."""


class Sampling(msgspec.Struct, frozen=True):
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0


class PrefillJob(msgspec.Struct, frozen=True, tag="prefill"):
    transfer: bytes
    prompt: list[int]
    sampling: Sampling
    deadline_s: float
    num_top: int = 0
    """Likeliest tokens to tell with the first token."""
    prompt_top: int | None = None
    """Likeliest tokens to tell with each prompt token; None: the prompt is not scored."""


class DecodeJob(msgspec.Struct, frozen=True, tag="decode"):
    transfer: bytes
    prompt: list[int]
    """Its state comes from P; the tokens say what of it is here already, and what may be proposed."""
    max_tokens: int
    sampling: Sampling
    ignore_eos: bool
    prefill_control: str
    """zmq endpoint of the prefill worker's control channel."""
    prefill_incarnation: int
    deadline_s: float
    num_top: int = 0
    prompt_top: int | None = None
    """As the prefill job says."""

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt)


class AbortJob(msgspec.Struct, frozen=True, tag="abort"):
    """The client is gone or the router gave up. The job ends as failed "cancelled" unless it has ended already."""

    transfer: bytes


class FinishJob(msgspec.Struct, frozen=True, tag="finish"):
    """The front has enough of a decode job that has begun to answer: it ends well, as if its last token had come."""

    transfer: bytes


class ReleaseLease(msgspec.Struct, frozen=True, tag="release"):
    """An operator ends a lease of this prefill worker: the transfer fails. Harmless where there is none."""

    transfer: bytes


class StatusQuery(msgspec.Struct, frozen=True, tag="status?"):
    query: int
    with_series: bool = False
    """Also what has been counted."""


class ManifestQuery(msgspec.Struct, frozen=True, tag="manifest?"):
    query: int


class BeatQuery(msgspec.Struct, frozen=True, tag="beat?"):
    """Answered by the thread that reads the link, whatever the others are at."""

    query: int


ToEngine = PrefillJob | DecodeJob | AbortJob | FinishJob | ReleaseLease | StatusQuery | ManifestQuery | BeatQuery


class RegionSummary(msgspec.Struct, frozen=True):
    """One kind of region over all layers and heads of a worker, for people."""

    name: str
    dtype: str
    layers: str
    """Global ids, as "3..59"."""
    heads: int
    bytes_per_token: int
    num_regions: int = 0
    """One a layer and head."""


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """Model loaded, arena registered, control channel bound. Nothing is accepted before it."""

    role: str
    incarnation: int
    control: str
    """zmq endpoint to give to peers."""
    manifest_digest: str
    """Hex; equal on workers that may be paired."""
    model_fingerprint: str
    max_model_len: int
    block_size: int
    num_pages: int
    """Of each rank, as are the next two."""
    bytes_per_token: int
    num_regions: int
    transport: str
    """One line: library, version, where found."""
    control_key: str = ""
    """Fingerprint of the own key; empty where the control channel is not encrypted."""
    accepted_keys: list[str] = []
    """Fingerprints of the keys that peers may have, the own one first."""
    tp_size: int = 1
    """Ranks of this worker."""
    regions: list[RegionSummary] = []


class EngineFatal(msgspec.Struct, frozen=True, tag="fatal"):
    """The engine process could not start or must end; it exits after this."""

    message: str
    exit_code: int


class TransferReport(msgspec.Struct, frozen=True):
    """What moving one request's state took, as D saw it."""

    num_pages: int
    num_regions: int
    num_spans: int
    num_bytes: int
    bytes_by_region: dict[str, int]
    bytes_before_done: int
    """Bytes that had landed when P's Done arrived."""
    read_s: float
    """Time during which at least one read was outstanding."""
    total_s: float
    """From the first Acquire to the last byte."""
    path: str
    peer: str
    cached_tokens: int = 0
    """Prompt tokens whose state P had before: it did not compute them."""
    resident_pages: int = 0
    """Pages that D had before: they did not travel, and are not among ``num_pages``."""
    exposed_s: float = 0.0
    """From P's Done to the last byte: what of the move was not hidden behind prefill."""
    hidden_fraction: float = 0.0
    """Share of the bytes that had landed when P's Done arrived."""
    granted_s: float = 0.0
    """From Acquire to Granted: P's queue included."""
    posted_s: float = 0.0
    """Longest time from a message that allowed reads to their being posted."""
    compared_s: float = 0.0
    """From the last byte, or Done where that came later, to the last digest that was equal; 0 without
    ``--verify-pages``."""
    first_step_s: float | None = None
    """From the last byte, or digest, to D's first step of this request; None where there was none."""
    resident_at: float = 0.0
    """When D had all of it: seconds since 1970."""


class TokensOut(msgspec.Struct, frozen=True, tag="tokens"):
    transfer: bytes
    tokens: list[int]
    logprobs: list[float]
    top: list[TopLogprobs] = []
    """One a token where the job asked for them, else empty."""
    prompt: PromptLogprobs | None = None
    """With the first token, where the job asked: of all prompt tokens but the first."""


class StepTokens(msgspec.Struct, frozen=True, tag="step"):
    """``TokensOut`` of several jobs, entry by entry: one message for what a step generated, and no more of any job than
    that. Entries of one job follow one another."""

    transfers: tuple[bytes, ...]
    tokens: list[int]
    logprobs: list[float]

    def each(self) -> Iterator[TokensOut]:
        """What is told of each job."""
        entries = zip(self.transfers, self.tokens, self.logprobs, strict=True)
        for transfer, mine in groupby(entries, key=itemgetter(0)):
            _, tokens, logprobs = zip(*mine, strict=True)
            yield TokensOut(transfer, list(tokens), list(logprobs))


class GroupTokens(msgspec.Struct, frozen=True, tag="group"):
    """What a step generated for jobs that decode step after step: one token of each, and as little as can be said."""

    transfers: list[bytes] | None
    """By place; None: as the last such message said."""
    tokens: bytes
    """By place, native integers of eight bytes; -1: none of that job."""
    logprobs: bytes
    """By place, native doubles."""
    top_counts: bytes = b""
    """By place, native integers of eight bytes; empty where no job asks for any."""
    tops: bytes = b""
    """As ``Tops.pack`` makes them."""


class TokenReader:
    """Tells single jobs' tokens from what the engine process says of several. Owned by whoever reads the link: it has
    to see every message, in order."""

    def __init__(self) -> None:
        self._transfers: list[bytes] = []

    def each(self, message: StepTokens | GroupTokens) -> Iterator[TokensOut]:
        """What is told of each job."""
        if isinstance(message, StepTokens):
            return message.each()
        if message.transfers is not None:
            self._transfers = message.transfers
        told = zip(
            self._transfers, memoryview(message.tokens).cast("q"), memoryview(message.logprobs).cast("d"), strict=True
        )
        if not message.top_counts:
            return (TokensOut(transfer, [token], [logprob]) for transfer, token, logprob in told if token >= 0)
        tops = Tops.unpack(message.top_counts, message.tops).each()
        return (
            TokensOut(transfer, [token], [logprob], [top] if top.token_ids else [])
            for (transfer, token, logprob), top in zip(told, tops, strict=True)
            if token >= 0
        )


class JobFinished(msgspec.Struct, frozen=True, tag="finished"):
    """The job's last message. On P: the prompt's state is ready for D. On D: the last token has been sent."""

    transfer: bytes
    reason: str
    """"stop", "length" (D) or "prefilled" (P)."""
    report: TransferReport | None = None


class JobFailed(msgspec.Struct, frozen=True, tag="failed"):
    """The job's last message, instead of ``JobFinished``."""

    transfer: bytes
    code: str
    """A ``FailureCode`` value."""
    message: str
    status: int
    """HTTP status to answer with while no byte has been sent."""


class PeerStatus(msgspec.Struct, frozen=True):
    control: str
    incarnation: int
    state: str
    path: str
    probe_gbps: float
    note: str = ""
    """What the transport says of the way beyond ``path``: "staged through pinned host memory"."""


class LeaseStatus(msgspec.Struct, frozen=True):
    """A lease that a prefill worker has granted."""

    transfer: str
    """32 hex digits."""
    peer: str
    """The decode worker that holds it."""
    state: str
    """Of the transfer: "prefilling", "done" (all may be read), "failing" (it has failed, and may still be read)."""
    num_pages: int
    age_s: float
    """Since its pages were granted."""
    left_s: float
    """Until it ends, unless it is renewed before."""


class Status(msgspec.Struct, frozen=True, tag="status"):
    """Numbers for people and tests. Pages: free = usable means that nothing is held."""

    query: int
    role: str
    incarnation: int
    pages_usable: int
    pages_free: int
    fragmentation: float
    requests_queued: int
    requests_running: int
    transfers_open: int
    leases_active: int
    reads_outstanding: int
    messages_dropped: int
    peers: list[PeerStatus]
    series: list[Series] = []
    leases: list[LeaseStatus] = []


class Manifests(msgspec.Struct, frozen=True, tag="manifest"):
    query: int
    ranks: tuple[Manifest, ...]
    """Of all ranks, in order: what is compared at a handshake."""


class Beat(msgspec.Struct, frozen=True, tag="beat"):
    """Seconds since the engine and the agent thread last came round."""

    query: int
    engine_age_s: float
    agent_age_s: float


ToFront = (
    EngineReady
    | EngineFatal
    | TokensOut
    | StepTokens
    | GroupTokens
    | JobFinished
    | JobFailed
    | Status
    | Manifests
    | Beat
)


def encode_frame(message: msgspec.Struct) -> bytes:
    """One message as a length-prefixed msgpack frame."""
    body = msgspec.msgpack.encode(message)
    return _LENGTH.pack(len(body)) + body


class BlockingLink:
    """The engine process's end. ``receive_bytes`` and ``release`` belong to one thread; any may call the rest."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._reader = sock.makefile("rb")
        self._send_lock = threading.Lock()

    def receive_bytes(self) -> bytes | None:
        """The next frame's body, or None when the other process has gone."""
        try:
            header = self._reader.read(_LENGTH.size)
            if len(header) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(header)
            assert length <= MAX_FRAME_BYTES, "our own front sends no such frame"
            body = self._reader.read(length)
        except OSError:
            return None
        return body if len(body) == length else None

    def send(self, message: msgspec.Struct) -> None:
        """Send one message; silently nothing when the other process has gone, as ``receive_bytes`` will tell."""
        self.send_frame(encode_frame(message))

    def send_frame(self, frame: bytes) -> None:
        """The same with what ``encode_frame`` made, for a message that goes to several."""
        with self._send_lock:
            try:
                self._sock.sendall(frame)
            except OSError:
                return

    def end(self) -> None:
        """Let both ends read that it is over, and end a ``send`` that the other end does not take. Idempotent."""
        with contextlib.suppress(OSError):  # not under the lock, which that sender holds
            self._sock.shutdown(socket.SHUT_RDWR)

    def release(self) -> None:
        """Give back the descriptor, without a word to the other end where other processes hold it open too."""
        with self._send_lock:
            self._reader.close()
            self._sock.close()
