"""What ``pdkv describe`` tells of a worker: its own words about itself, and its numbers right now."""

from typing import TypeVar

import httpx
import msgspec

from pdkv.daemons import worker_api
from pdkv.daemons.link import Status
from pdkv.errors import PdkvError

SCHEMA = "pdkv.describe/v1"
Answer = TypeVar("Answer")


class Description(msgspec.Struct, frozen=True):
    schema: str
    url: str
    info: worker_api.WorkerInfo
    status: Status | None
    """None while the model is loading."""


def fetch_info(url: str) -> worker_api.WorkerInfo:
    """``GET /pdkv/v1/info`` of a worker. Raises ``PdkvError`` when there is none at ``url``."""
    return _get(url, worker_api.INFO_PATH, worker_api.WorkerInfo)


def describe_worker(url: str) -> Description:
    """Ask the worker at ``url``. Raises ``PdkvError`` when there is none."""
    info = fetch_info(url)
    status = _get(url, worker_api.STATUS_PATH, Status) if info.ready else None
    return Description(SCHEMA, url.rstrip("/"), info, status)


def told(found: Description) -> str:
    """For people."""
    info, status = found.info, found.status
    size = f"{info.num_regions} regions, {info.bytes_per_token:,} bytes a token"
    each = f" on each of {info.tp_size} ranks" if info.tp_size > 1 else ""
    lines = [
        f"{info.role} worker at {found.url}, {'ready' if info.ready else 'loading'}, pdkv {info.version}",
        f"model        {info.model} (fingerprint {info.model_fingerprint[:16]}), up to {info.max_model_len:,} tokens",
        f"incarnation  {info.incarnation}",
        f"control      {info.control.partition('#')[0] or 'dials only'}, {told_encryption(info)}",
        f"transport    {info.transport}",
        f"manifest     {info.manifest_digest}: {size}{each}",
    ]
    for region in info.regions:
        heads = f"{region.heads} head{'s' if region.heads > 1 else ''}"
        lines.append(
            f"  {region.name:<9}  {region.dtype}, layers {region.layers}, {heads}, {region.bytes_per_token:,} B/token"
        )
    if status is not None:
        free, usable = status.pages_free, status.pages_usable
        lines += [
            f"pages        {free:,} of {usable:,} free, fragmentation {status.fragmentation:.2f}",
            f"requests     {status.requests_running} running, {status.requests_queued} queued",
            f"transfers    {status.transfers_open} open, {status.leases_active} leases, "
            f"{status.reads_outstanding} reads outstanding, {status.messages_dropped} messages dropped",
            *(["peers        none yet"] if not status.peers else ["peers"]),
        ]
        for peer in status.peers:
            note = f" ({peer.note})" if peer.note else ""
            path = f" over {peer.path}{note}, probe at {peer.probe_gbps:.2f} GB/s" if peer.path else ""
            lines.append(f"  {peer.incarnation:016x}  {peer.control} {peer.state}{path}")
    return "\n".join(lines)


def told_encryption(info: worker_api.WorkerInfo) -> str:
    """For people: whether a worker's control channel is encrypted, and by which keys."""
    if not info.control_key:
        return "not encrypted"
    others = [key for key in info.accepted_keys if key != info.control_key]
    return f"encrypted, key {info.control_key}" + (f", also accepts {', '.join(others)}" if others else "")


def _get(url: str, path: str, kind: type[Answer]) -> Answer:
    try:
        answer = httpx.get(url.rstrip("/") + path, timeout=10, trust_env=False)
        answer.raise_for_status()
        return msgspec.json.decode(answer.content, type=kind)
    except (httpx.HTTPError, httpx.InvalidURL) as exc:
        raise PdkvError(f"no pdkv worker answers at {url}: {exc}") from exc
    except msgspec.MsgspecError as exc:
        raise PdkvError(f"what answers at {url} is no pdkv worker: {exc}") from exc
