"""A whole deployment on this machine: prefill workers, decode workers and a router on free ports of 127.0.0.1."""

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NamedTuple

import httpx
import structlog

from pdkv.daemons import http_server
from pdkv.daemons.api_keys import ApiKeys
from pdkv.daemons.config import (
    Address,
    DecodeConfig,
    RouterConfig,
    ServedConfig,
    UpConfig,
    child_environment,
    flag_name,
)
from pdkv.daemons.control_keys import channel_security
from pdkv.daemons.gpu_order import VARIABLE, orders, visible_gpus
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.supervisor import ChildSpec, Supervisor

_POLL_S = 0.1
_REMIND_S = 15.0
_WORKER_DRAIN_S = 4.0
"""The router has drained, or given up, before a worker is told to end: only leases can be left."""
_log = structlog.get_logger(__name__)


class Ports(NamedTuple):
    """Where one child listens."""

    data: Address
    admin: Address


class Deployment(NamedTuple):
    url: str
    admin_urls: dict[str, str]
    """By child, for example "prefill-0"."""


@contextlib.asynccontextmanager
async def deployed(
    config: UpConfig,
    print_line: Callable[[str], None],
    decode_flags: Sequence[str] = (),
    router_flags: Sequence[str] = (),
) -> AsyncIterator[Deployment]:
    """Start a deployment, tell where it is when it is ready, and end all of it on leaving. Raises StartFailedError.

    ``decode_flags``, ``router_flags``: what such workers, or the router, get besides.
    """
    with contextlib.ExitStack() as stack:

        def reserve(host: str, port: int) -> Address:
            return http_server.bound_address(stack.enter_context(reserve_port(host, port)))

        def ports(host: str, port: int) -> Ports:
            return Ports(reserve(host, port), reserve("127.0.0.1", 0))

        router = ports(config.host, config.port)
        workers = [ports("127.0.0.1", 0) for _ in range(config.num_prefill + config.num_decode)]
        besides = {"decode": decode_flags, "router": router_flags}
        specs = [
            spec._replace(args=(*spec.args, *besides.get(spec.args[0], ())))
            for spec in child_specs(config, router, workers, visible_gpus() if config.device == "cuda" else ())
        ]
        supervisor = Supervisor(
            specs,
            child_environment(OMP_WAIT_POLICY="PASSIVE"),
            restart=not config.no_restart,
            drain_s=config.drain_timeout,
            print_line=print_line,
        )
        url = f"http://{_reachable(router.data)}"
        admin_urls = {spec.name: f"http://{each.admin}" for spec, each in zip(specs, [*workers, router], strict=True)}
        async with supervisor.running():
            await supervisor.settled_after(_poll_health(url))
            yield Deployment(url, admin_urls)


async def run_up(config: UpConfig) -> int:
    """``pdkv up``: serve until a signal, then drain; a second signal kills. Returns the exit code."""
    life = Lifecycle()
    with life.on_signals():
        serving = asyncio.create_task(_serve(config))
        ending = asyncio.create_task(life.wait_for_end())
        await asyncio.wait((serving, ending), return_when=asyncio.FIRST_COMPLETED)
        ending.cancel()
        if serving.done():
            await serving  # it ends only by failing
        _log.info("ending; a second signal kills")
        serving.cancel()
        hurrying = asyncio.create_task(life.wait())
        await asyncio.wait((serving, hurrying), return_when=asyncio.FIRST_COMPLETED)
        hurrying.cancel()
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
    return life.ending_code


async def _serve(config: UpConfig) -> None:
    security = channel_security(str(config.control_keys or ""))  # the workers do so too; wrong keys are told at once
    keys: tuple[str, ...] = ()
    if config.api_keys is not None:
        ApiKeys(config.api_keys)  # likewise
        keys = (flag_name(RouterConfig, "api_keys"), str(config.api_keys))
    channel = f"encrypted, key {security.fingerprint}" if security.authenticated else "not encrypted"
    async with deployed(config, print_to_stderr, router_flags=keys) as deployment:
        url = deployment.url
        admin = "".join(f"  {name:<12} {admin_url}/metrics\n" for name, admin_url in deployment.admin_urls.items())
        told = f"{admin}\n  control channel: {channel}\n"
        sys.stdout.write(f"ready: {url}\n\n  {curl_line(config, url)}\n\n{told}\n")
        sys.stdout.flush()
        await asyncio.Event().wait()


def print_to_stderr(line: str) -> None:
    """One line of a child, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def child_specs(config: UpConfig, router: Ports, workers: Sequence[Ports], gpus: Sequence[str] = ()) -> list[ChildSpec]:
    """The command lines of all children; ``workers``: the prefill workers' ports, then the decode workers'. With more
    than one of ``gpus``, as CUDA names them, each worker gets its own as long as there are any."""
    names = [f"prefill-{i}" for i in range(config.num_prefill)] + [f"decode-{i}" for i in range(config.num_decode)]
    assert len(names) == len(workers), "one address a worker"
    cores = len(os.sched_getaffinity(0))
    threads = config.threads or max(1, cores // len(names))
    log = ("--log-level", config.log_level, "--log-format", _log_format(config.log_format))
    ranks = [config.prefill_tp] * config.num_prefill + [config.decode_tp] * config.num_decode
    specs = []
    for name, ports, order in zip(names, workers, orders(gpus, ranks), strict=True):
        role = name.partition("-")[0]
        own = ("--threads", str(threads), *_served_flags(config), *_rank_flags(config, role))
        env = ((VARIABLE, ",".join(order)),) if len(order) > 1 else ()
        specs.append(ChildSpec(name, (role, *_lifecycle_flags(ports, _WORKER_DRAIN_S), *log, *own), env))
    urls = [(names[i].partition("-")[0], f"http://{ports.data}") for i, ports in enumerate(workers)]
    targets = [part for role, url in urls for part in (flag_name(RouterConfig, f"{role}_urls"), url)]
    own = ("--request-timeout", str(config.request_timeout), *targets)
    return [*specs, ChildSpec("router", ("router", *_lifecycle_flags(router, config.drain_timeout), *log, *own))]


def _lifecycle_flags(ports: Ports, drain_s: float) -> tuple[str, ...]:
    listen = ("--listen", str(ports.data), "--admin-listen", str(ports.admin), "--reuse-port")
    return (*listen, "--drain-timeout", str(drain_s))


def curl_line(config: UpConfig, url: str) -> str:
    """A request to try, as a shell command."""
    has_tokenizer = (config.model / "tokenizer.json").exists()
    body = {
        "model": config.served_model_name or config.model.resolve().name,
        "prompt": "Hello" if has_tokenizer else [1, 2, 3],
        "max_tokens": 16,
        "temperature": 0,
        **({} if has_tokenizer else {"return_token_ids": True}),
    }
    key = "" if config.api_keys is None else '-H "Authorization: Bearer $KEY" '
    return f"curl {url}/v1/completions {key}-H 'Content-Type: application/json' -d '{json.dumps(body)}'"


def _served_flags(config: ServedConfig) -> list[str]:
    flags: list[str] = []
    for field in ServedConfig.model_fields:
        value = getattr(config, field)
        if field in ("log_level", "log_format") or value in (None, "", False):
            continue
        flags += [flag_name(DecodeConfig, field)] if value is True else [flag_name(DecodeConfig, field), str(value)]
    return flags


def _rank_flags(config: UpConfig, role: str) -> list[str]:
    flags = ["--tp", str(config.prefill_tp if role == "prefill" else config.decode_tp)]
    if role == "prefill":
        flags += ["--layer-groups", str(config.layer_groups)]
    else:
        flags += ["--speculative-tokens", str(config.speculative_tokens)]
        flags += ["--max-pull-gbps", str(config.max_pull_gbps), "--verify-pages", config.verify_pages]
    return [*flags, "--ep"] if config.ep else flags


def _log_format(wanted: str) -> str:
    """Children write into a pipe; the form is chosen by where their lines end up."""
    return ("console" if sys.stderr.isatty() else "json") if wanted == "auto" else wanted


def reserve_port(host: str, port: int) -> socket.socket:
    """A port that stays ours while the socket is open, also while the child that listens on it is being restarted."""
    http_server.bind(Address(f"{host}:{port}")).close()  # refuses a port that somebody else reserved in the same way
    return http_server.bind(Address(f"{host}:{port}"), reuse_port=True)


def _reachable(address: Address) -> str:
    return f"127.0.0.1:{address.port}" if address.host in ("0.0.0.0", "::") else str(address)


async def _poll_health(url: str) -> None:
    loop = asyncio.get_running_loop()
    remind_at = loop.time() + _REMIND_S
    async with httpx.AsyncClient(trust_env=False, timeout=5.0) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                response = await client.get(url + "/health")
                if response.status_code == 200:
                    return
                if loop.time() > remind_at:
                    _log.info("still waiting", health=response.text)
                    remind_at = loop.time() + _REMIND_S
            await asyncio.sleep(_POLL_S)
