"""What router and workers say to each other over HTTP, besides OpenAI's own requests and answers."""

from typing import Literal

import msgspec

from pdkv.daemons.link import RegionSummary
from pdkv.schema import Manifest

INFO_PATH = "/pdkv/v1/info"
STATUS_PATH = "/pdkv/v1/status"
MANIFEST_PATH = "/pdkv/v1/manifest"
PREFILL_PATH = "/pdkv/v1/prefill"
PREFILL_CHAT_PATH = "/pdkv/v1/prefill/chat"
COMPLETIONS_PATH = "/v1/completions"
CHAT_PATH = "/v1/chat/completions"
PREFILL_PATHS = {COMPLETIONS_PATH: PREFILL_PATH, CHAT_PATH: PREFILL_CHAT_PATH}
"""Where P takes the requests that clients send to these paths; D takes them under the clients' own."""
TOKENIZE_PATH = "/tokenize"
DETOKENIZE_PATH = "/detokenize"
TOKENIZER_INFO_PATH = "/tokenizer_info"
TEXT_PATHS = {TOKENIZE_PATH: "POST", DETOKENIZE_PATH: "POST", TOKENIZER_INFO_PATH: "GET"}
"""What every worker answers about its tokenizer, and the router passes on."""

REQUEST_ID = "x-request-id"
TRANSFER = "x-pdkv-transfer"
"""The transfer id, 32 hex digits, the same for P and D."""
DEADLINE = "x-pdkv-deadline"
"""Seconds that are left to the request; a duration, because clocks of two machines are never compared."""
ASKED_AT = "x-pdkv-asked-at"
"""When the router took the request, in seconds since 1970: the clock of chat templates, the same for P and D."""
PREFILL_CONTROL = "x-pdkv-prefill-control"
PREFILL_INCARNATION = "x-pdkv-prefill-incarnation"
DEBUG = "x-pdkv-debug"


class WorkerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /pdkv/v1/info``. What only a loaded engine knows is empty until ``ready``."""

    role: str
    ready: bool
    """It answers, is not draining, and may be sent requests."""
    model: str
    problem: str = ""
    """Why it is not ready."""
    admin: str = ""
    """HOST:PORT of its admin port, as it listens there: the host may be 0.0.0.0 or [::]."""
    incarnation: str = ""
    """16 hex digits."""
    control: str = ""
    """zmq endpoint of the control channel."""
    manifest_digest: str = ""
    prompt_digest: str = ""
    """Of tokenizer and chat templates: workers where it is equal make the same ids of every request."""
    model_fingerprint: str = ""
    max_model_len: int = 0
    block_size: int = 0
    tp_size: int = 1
    """Ranks of the worker; what follows is so on each of them."""
    num_pages: int = 0
    bytes_per_token: int = 0
    num_regions: int = 0
    transport: str = ""
    control_key: str = ""
    """Fingerprint of the worker's key; empty where its control channel is not encrypted."""
    accepted_keys: list[str] = []
    """Fingerprints of the keys that its peers may have, the own one first."""
    version: str = ""
    regions: list[RegionSummary] = []

    def fits(self, other: "WorkerInfo") -> bool:
        """They may be asked for one answer together."""
        return (self.manifest_digest, self.prompt_digest) == (other.manifest_digest, other.prompt_digest)


class ManifestDocument(msgspec.Struct, frozen=True, kw_only=True):
    """Answer of ``GET /pdkv/v1/manifest``, and what a file holds that ``pdkv manifest diff`` reads."""

    schema: Literal["pdkv.manifest/v1"] = "pdkv.manifest/v1"
    role: str
    model: str
    incarnation: str
    """16 hex digits."""
    manifest_digest: str
    """Equal on workers that may be paired."""
    prompt_digest: str
    """Of tokenizer and chat templates; the router pairs only workers where it is equal."""
    ranks: list[Manifest]


class Prefilled(msgspec.Struct, frozen=True):
    """Answer of ``POST /pdkv/v1/prefill`` and its like: the state of these many tokens is ready to be read."""

    prompt_tokens: int
