"""Configuration of every role: flag, then ``PDKV_*`` environment, then YAML file, then default.

One schema per role; its fields are the flags, the YAML keys and, upper-cased behind ``PDKV_``, the environment's
names. What no schema knows is an error that names the nearest key. Nothing else in pdkv reads the environment.
"""

import difflib
import ipaddress
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, InitSettingsSource, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict

from pdkv.errors import ConfigError

ENV_PREFIX = "PDKV_"
_CONFIG_VARIABLE = "PDKV_CONFIG"
_OTHER_VARIABLES = {_CONFIG_VARIABLE, "PDKV_UCX_INCLUDE"}  # the latter is setup.py's


class Flag:
    """How a field appears on the command line, where the schema's own name and description do not say it."""

    def __init__(
        self,
        name: str | None = None,
        *,
        metavar: str = "",
        advanced: bool = False,
        hidden: bool = False,
        secret: bool = False,
    ) -> None:
        self.name = name
        self.metavar = metavar
        """What the value looks like; empty: as its type has it."""
        self.secret = secret
        """Never shown by ``pdkv config show``."""
        self.advanced = advanced
        """Shown by ``--help-all`` only."""
        self.hidden = hidden
        """Between our own processes; shown nowhere."""


_ADVANCED = Flag(advanced=True)


class Address(str):
    """ "HOST:PORT", checked; port 0 asks the system for any."""

    host: str
    port: int

    def __new__(cls, text: str) -> "Address":
        host, colon, port = text.removeprefix("tcp://").rpartition(":")
        host = host.strip("[]")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise ValueError("expected HOST:PORT, for example 127.0.0.1:8000")
        self = super().__new__(cls, f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        self.host, self.port = host, int(port)
        return self

    @property
    def is_loopback(self) -> bool:
        return is_loopback(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; a name that is not "localhost" counts as reachable."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _split_commas(value: object) -> object:
    return [part for part in value.split(",") if part] if isinstance(value, str) else value


DNS_SCHEME = "dns://"
"""Instead of one worker's URL: every address of the name is a worker, looked up again and again."""


def _worker_url(value: str) -> str:
    if value.startswith(DNS_SCHEME):
        if not Address(value.removeprefix(DNS_SCHEME).rstrip("/")).port:
            raise ValueError(f"{value!r} needs the port that its workers listen on")
    elif not value.startswith(("http://", "https://")):
        raise ValueError(f"{value!r} is not a URL; expected http://HOST:PORT, or dns://HOST:PORT for all its addresses")
    return value.rstrip("/")


def _refuse_reachable(name: str, address: str, harm: str, mend: str) -> None:
    if not Address(address).is_loopback:
        raise ValueError(
            f"{name} is {address}, which other machines can reach, and {harm}. {mend}, or spell out --insecure on a "
            "network that you trust"
        )


_LAYER_GROUPS = Field(ge=1, le=64, description="Parts in which a prompt's last chunk can be read, layers by layers.")
_MAX_PULL = Field(
    ge=0, description="Most gigabytes a second that decode pulls, to spare what it decodes; 0 = no limit."
)
_VERIFY = Field(description="Compare digests of pages that decode has read with prefill's.")
_API_KEYS = Field(description="File of the API keys that clients need, one a line; default: no key is needed.")
_CONTROL_KEYS = Field(description="Folder of keys for the control channel.")
_ADMIN = "Address of probes (/livez, /readyz, /startupz), /metrics and POST /drain; port 0 = any."
Verify = Annotated[
    Literal["off", "sample", "full"],
    BeforeValidator(lambda value: "off" if value is False else value),  # what YAML makes of a bare off
]
AddressText = Annotated[str, AfterValidator(Address)]
Urls = Annotated[tuple[Annotated[str, AfterValidator(_worker_url)], ...], NoDecode, BeforeValidator(_split_commas)]


class RoleConfig(BaseSettings):
    """What every role has."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, extra="forbid", frozen=True, env_ignore_empty=False)

    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Field(description="Least severe level logged.")
    ] = "info"
    log_format: Annotated[
        Literal["auto", "console", "json"],
        Field(description="Form of the log lines on stderr; auto: console on a terminal, JSON otherwise."),
        _ADVANCED,
    ] = "auto"


class ServedConfig(RoleConfig):
    """What ``pdkv up`` hands on to each of its workers."""

    model: Annotated[Path, Field(description="Checkpoint folder: config.json, *.safetensors, tokenizer.json.")]
    served_model_name: Annotated[str, Field(description="Name in the API; default: the folder's name.")] = ""
    max_model_len: Annotated[
        int, Field(ge=0, description="Longest prompt + answer in tokens; 0 = the model's own, at most 32,768.")
    ] = 0
    max_batch: Annotated[int, Field(ge=1, description="Requests worked on at once, per worker.")] = 8
    num_pages: Annotated[
        int, Field(ge=0, description="Pages of 128 tokens per worker; 0 = sized for max-batch requests."), _ADVANCED
    ] = 0
    max_prompts: Annotated[int, Field(ge=1, description="Prompts that one request may hold."), _ADVANCED] = 128
    prefill_chunk: Annotated[
        int, Field(ge=0, description="Prompt tokens computed at a time; 0 = 512, on a GPU as many as it has room for.")
    ] = 0
    device: Annotated[
        Literal["cpu", "cuda"], Field(description="Where models run; each rank has a GPU of its own."), _ADVANCED
    ] = "cpu"
    gpu_memory_utilization: Annotated[
        float,
        Field(gt=0, le=1, description="Share of a GPU's memory that a worker may fill, weights included."),
        _ADVANCED,
    ] = 0.9
    load_format: Annotated[
        Literal["auto", "dummy"],
        Field(description="dummy: random weights in the shapes of config.json, for measuring."),
        _ADVANCED,
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], Field(description="Storage of weights and K/V; auto: the checkpoint's.")
    ] = "auto"
    kv_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "fp8", "fp8_unit", "fp8_e5m2"],
        Field(description="Storage of K/V; fp8: e4m3 with a scale per token and head; auto: as --dtype."),
    ] = "auto"
    index_dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16", "fp8"],
        Field(description="Storage of index keys; fp8: e4m3 without a scale; auto: as --dtype."),
    ] = "auto"
    index_topk_freq: Annotated[
        int,
        Field(ge=0, description="Every N-th sparse layer selects, those between reuse it; 0 = as config.json says."),
        _ADVANCED,
    ] = 0
    index_topk_pattern: Annotated[
        str,
        Field(description="One letter a sparse layer, S = reuse the selection; goes before the frequency."),
        _ADVANCED,
    ] = ""
    index_skip_topk_offset: Annotated[
        int, Field(ge=0, description="Sparse layers before --index-topk-freq begins to count."), _ADVANCED
    ] = 0
    no_prefix_cache: Annotated[bool, Field(description="Compute and move every prompt whole.")] = False
    batch_invariant: Annotated[
        bool,
        Field(
            description="A greedy answer's bits hang on no other request; slower. One rank a worker, nothing cached."
        ),
        _ADVANCED,
    ] = False
    transport: Annotated[
        Literal["auto", "nixl", "nvlink", "shm", "sockets", "ucx"],
        Field(description="What moves pages, auto: what can; nixl: only NIXL, which is installed apart."),
    ] = "auto"
    require_transport: Annotated[
        Literal["rdma", "cuda_ipc", "shm", "tcp"] | None, Field(description="Refuse a peer reached by a lesser path.")
    ] = None
    nvlink_blocks: Annotated[
        int,
        Field(ge=1, le=1024, description="Most thread blocks that a GPU spends on gathering short spans."),
        _ADVANCED,
    ] = 64
    ucx_tls: Annotated[str | None, Field(description="UCX transports to use, as in UCX_TLS."), _ADVANCED] = None
    ucx_library: Annotated[
        str | None,
        Field(description="The libucp to load; default: a system one with InfiniBand, else the wheel's."),
        _ADVANCED,
    ] = None
    lease_ttl_s: Annotated[
        float, Field(gt=0, le=600, description="Seconds that decode may read pages without a sign of life."), _ADVANCED
    ] = 10.0
    control_keys: Annotated[Path | None, _CONTROL_KEYS] = None


class WorkerConfig(ServedConfig):
    """A prefill or decode worker."""

    listen: Annotated[AddressText, Field(description="HTTP address, for the router.")]
    control_listen: Annotated[
        AddressText, Field(description="Control channel's address, for the workers of the other role; port 0 = any.")
    ] = Address("127.0.0.1:0")
    advertise_host: Annotated[
        str, Field(description="Host that peers are told to reach; default: that of --control-listen.")
    ] = ""
    insecure: Annotated[bool, Field(description="Trust whoever reaches a port of this worker.")] = False
    """Without keys, ports may be reached from beyond this machine. In any case, POSTs to the admin port may."""
    admin_listen: Annotated[AddressText, Field(description=_ADMIN)]
    drain_timeout: Annotated[float, Field(gt=0, description="After SIGTERM: seconds in which what runs may end.")]
    stall_timeout: Annotated[
        float, Field(gt=0, description="Not live when a thread takes longer for one step, in seconds."), _ADVANCED
    ] = 60.0
    threads: Annotated[int, Field(ge=0, description="Torch threads; 0 = all cores.")] = 0
    tp: Annotated[int, Field(ge=1, le=64, description="Tensor-parallel ranks, one process each.")] = 1
    ep: Annotated[bool, Field(description="Ranks hold whole experts instead of a slice of each."), _ADVANCED] = False
    reuse_port: Annotated[bool, Flag(hidden=True)] = False

    @property
    def drain_s(self) -> float:
        """Seconds that a drain may take."""
        return self.drain_timeout

    @model_validator(mode="after")
    def _invariant_on_one_gpu(self) -> "WorkerConfig":
        _refuse_variance(self, self.tp, self.speculative_tokens if isinstance(self, DecodeConfig) else 0)
        return self

    @model_validator(mode="after")
    def _only_loopback(self) -> "WorkerConfig":
        if self.control_keys is None and not self.insecure:
            for name in ("listen", "control_listen", "admin_listen"):
                can = "end this worker" if name == "admin_listen" else "read the K/V of every request"
                harm = f"without keys pdkv does not authenticate its peers: whoever reaches it can {can}"
                mend = "Give --control-keys (pdkv keys new makes some), listen on 127.0.0.1"
                _refuse_reachable(name, getattr(self, name), harm, mend)
        host = self.advertise_host or Address(self.control_listen).host
        if host in ("0.0.0.0", "::"):
            raise ValueError(f"peers cannot reach {host}; --advertise-host must name this machine as they see it")
        return self


class PrefillConfig(WorkerConfig):
    listen: Annotated[AddressText, Field(description="HTTP address, for the router.")] = Address("127.0.0.1:8100")
    admin_listen: Annotated[AddressText, Field(description=_ADMIN)] = Address("127.0.0.1:8190")
    layer_groups: Annotated[int, _LAYER_GROUPS, _ADVANCED] = 4
    drain_timeout: Annotated[
        float,
        Field(gt=0, description="After SIGTERM: seconds in which pages wait to be pulled; default: a lease or 60."),
    ] = 60.0

    @property
    def drain_s(self) -> float:
        """The default is raised to a lease's length, in which whatever is held is let go."""
        given = "drain_timeout" in self.model_fields_set
        return self.drain_timeout if given else max(self.drain_timeout, self.lease_ttl_s)


class DecodeConfig(WorkerConfig):
    listen: Annotated[AddressText, Field(description="HTTP address, for the router.")] = Address("127.0.0.1:8200")
    admin_listen: Annotated[AddressText, Field(description=_ADMIN)] = Address("127.0.0.1:8290")
    drain_timeout: Annotated[
        float, Field(gt=0, description="After SIGTERM: seconds in which running answers may end.")
    ] = 300.0
    max_pull_gbps: Annotated[float, _MAX_PULL, _ADVANCED] = 0.0
    verify_pages: Annotated[Verify, _VERIFY] = "off"
    speculative_tokens: Annotated[
        int, Field(ge=0, le=7, description="Tokens proposed by prompt lookup and verified in one step; 0 = none.")
    ] = 0


class RouterConfig(RoleConfig):
    """The router: no model, no tokenizer, no torch."""

    prefill_urls: Annotated[
        Urls,
        Field(
            min_length=1, description="A prefill worker's URL, or dns://HOST:PORT for all behind a name; repeatable."
        ),
        Flag("prefill"),
    ]
    decode_urls: Annotated[
        Urls,
        Field(min_length=1, description="A decode worker's URL, or dns://HOST:PORT for all behind a name; repeatable."),
        Flag("decode"),
    ]
    listen: Annotated[AddressText, Field(description="HTTP address, for clients.")] = Address("127.0.0.1:8000")
    api_keys: Annotated[Path | None, _API_KEYS, Flag(metavar="FILE")] = None
    tls_cert: Annotated[
        Path | None,
        Field(description="Certificate of --listen in PEM, its chain behind it; default: HTTP without TLS."),
        Flag(metavar="FILE"),
    ] = None
    tls_key: Annotated[Path | None, Field(description="The certificate's key in PEM."), Flag(metavar="FILE")] = None
    request_timeout: Annotated[float, Field(gt=0, description="Seconds that a request may take in all.")] = 600.0
    retries: Annotated[int, Field(ge=0, le=10, description="New tries, on another pair, before the first byte.")] = 2
    poll_interval: Annotated[float, Field(gt=0, description="Seconds between looks at each worker."), _ADVANCED] = 1.0
    admin_listen: Annotated[AddressText, Field(description=_ADMIN)] = Address("127.0.0.1:8090")
    drain_timeout: Annotated[
        float, Field(gt=0, description="After SIGTERM: seconds in which running requests may end.")
    ] = 30.0
    insecure: Annotated[
        bool, Field(description="Allow an --admin-listen beyond this machine although nobody is authenticated there.")
    ] = False
    reuse_port: Annotated[bool, Flag(hidden=True)] = False

    @model_validator(mode="after")
    def _only_loopback(self) -> "RouterConfig":
        if not self.insecure:
            harm = "pdkv does not authenticate who calls it: whoever reaches it can end this router"
            _refuse_reachable("admin_listen", self.admin_listen, harm, "Listen on 127.0.0.1")
        return self

    @model_validator(mode="after")
    def _certificate_with_key(self) -> "RouterConfig":
        if (self.tls_cert is None) != (self.tls_key is None):
            given, lacks = ("tls_cert", "tls_key") if self.tls_key is None else ("tls_key", "tls_cert")
            raise ValueError(f"{given} needs {lacks}: TLS takes a certificate and its key")
        return self


class UpConfig(ServedConfig):
    """A whole deployment on this machine."""

    num_prefill: Annotated[int, Field(ge=1, description="Prefill workers."), Flag("prefill")] = 1
    num_decode: Annotated[int, Field(ge=1, description="Decode workers."), Flag("decode")] = 1
    prefill_tp: Annotated[int, Field(ge=1, le=64, description="Tensor-parallel ranks of each prefill worker.")] = 1
    decode_tp: Annotated[int, Field(ge=1, le=64, description="Tensor-parallel ranks of each decode worker.")] = 1
    ep: Annotated[bool, Field(description="Ranks hold whole experts instead of a slice of each."), _ADVANCED] = False
    speculative_tokens: Annotated[
        int, Field(ge=0, le=7, description="Tokens that decode proposes by prompt lookup; 0 = none.")
    ] = 0
    control_keys: Annotated[Path | None, _CONTROL_KEYS, _ADVANCED] = None
    layer_groups: Annotated[int, _LAYER_GROUPS, _ADVANCED] = 4
    max_pull_gbps: Annotated[float, _MAX_PULL, _ADVANCED] = 0.0
    verify_pages: Annotated[Verify, _VERIFY] = "off"
    host: Annotated[str, Field(description="Host that the router listens on.")] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535, description="Port that the router listens on; 0 = any.")] = 8000
    api_keys: Annotated[Path | None, _API_KEYS, Flag(metavar="FILE", advanced=True)] = None
    threads: Annotated[int, Field(ge=0, description="Torch threads of each worker; 0 = cores / workers.")] = 0
    request_timeout: Annotated[float, Field(gt=0, description="Seconds that a request may take in all.")] = 600.0
    drain_timeout: Annotated[
        float, Field(gt=0, le=10, description="After Ctrl-C: seconds in which running requests may end.")
    ] = 8.0
    no_restart: Annotated[bool, Field(description="Leave a worker that died dead.")] = False

    @model_validator(mode="after")
    def _invariant_on_one_gpu(self) -> "UpConfig":
        _refuse_variance(self, max(self.prefill_tp, self.decode_tp), self.speculative_tokens)
        return self


def _refuse_variance(config: ServedConfig, ranks: int, speculative_tokens: int) -> None:
    if not config.batch_invariant:
        return
    if config.device != "cuda":
        raise ValueError("--batch-invariant needs --device cuda: a CPU's products round by a row's place in the batch")
    if ranks > 1 or speculative_tokens:
        what = "one rank a worker: set --tp to 1" if ranks > 1 else "no --speculative-tokens: proposals change a step"
        raise ValueError(f"--batch-invariant needs {what}")


ROLES: tuple[type[RoleConfig], ...] = (PrefillConfig, DecodeConfig, RouterConfig, UpConfig)

Schema = TypeVar("Schema", bound=RoleConfig)


def load(schema: type[Schema], flags: Mapping[str, object], config_file: Path | None = None) -> Schema:
    """The role's configuration. ``flags`` holds only what the command line gave, by field name.

    Raises ConfigError that lists every wrong value with the source it came from.
    """
    _refuse_unknown_variables()
    path = config_path(config_file)
    from_file = read_yaml(schema, path) if path is not None else {}

    class Loaded(schema):  # type: ignore[valid-type, misc]  # the only hook that pydantic-settings has for a source
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
            file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, InitSettingsSource(settings_cls, init_kwargs=from_file)

    try:
        loaded: Schema = Loaded(**flags)
    except ValidationError as exc:
        raise ConfigError(_describe(exc, schema, flags, from_file, path)) from exc
    return loaded


def config_path(given: Path | None) -> Path | None:
    """The YAML file: that of the command line, else that of PDKV_CONFIG, else none."""
    return given or (Path(os.environ[_CONFIG_VARIABLE]) if os.environ.get(_CONFIG_VARIABLE) else None)


def child_environment(**extra: str) -> dict[str, str]:
    """The environment for a child that gets its whole configuration as flags: ours without ``PDKV_*``."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    return {**inherited, **extra}


def flag_name(schema: type[BaseSettings], field: str) -> str:
    """The flag of a field, with its dashes."""
    return "--" + (flag_of(schema, field).name or field.removesuffix("_s").replace("_", "-"))


def flag_of(schema: type[BaseSettings], field: str) -> Flag:
    """How a field appears on the command line."""
    return next((m for m in schema.model_fields[field].metadata if isinstance(m, Flag)), Flag())


def _refuse_unknown_variables() -> None:
    known = {ENV_PREFIX + name.upper() for role in ROLES for name in role.model_fields} | _OTHER_VARIABLES
    unknown = sorted(name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known)
    if unknown:
        raise ConfigError("; ".join(f"unknown environment variable {name}{_nearest(name, known)}" for name in unknown))


def read_yaml(schema: type[BaseSettings], path: Path) -> dict[str, Any]:
    """The file's keys and values. Raises ConfigError for what the schema does not know."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read the configuration file {path}: {exc.strerror}") from exc
    except (yaml.YAMLError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}") from exc
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} must hold keys and values, found {type(content).__name__}")
    unknown = [str(key) for key in content if key not in schema.model_fields]
    if unknown:
        raise ConfigError(
            "; ".join(f"{path}: unknown key {key!r}{_nearest(key, set(schema.model_fields))}" for key in unknown)
        )
    return content


def _nearest(name: str, known: set[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


def _describe(
    exc: ValidationError,
    schema: type[BaseSettings],
    flags: Mapping[str, object],
    from_file: Mapping[str, object],
    path: Path | None,
) -> str:
    lines = []
    for error in exc.errors(include_url=False):
        text = error["msg"].removeprefix("Value error, ")
        field = str(error["loc"][0]) if error["loc"] else ""
        if not field:
            lines.append(text)
        elif error["type"] == "missing":
            lines.append(f"{flag_name(schema, field)} is missing (or {ENV_PREFIX}{field.upper()}, or {field}: in YAML)")
        elif field in flags:
            lines.append(f"{flag_name(schema, field)}: {text}")
        elif ENV_PREFIX + field.upper() in os.environ:
            lines.append(f"{ENV_PREFIX}{field.upper()}: {text}")
        elif field in from_file:
            lines.append(f"{path}: {field}: {text}")
        else:
            lines.append(f"{field}: {text}")
    return "; ".join(lines)
