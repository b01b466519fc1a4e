"""Which transport a worker's settings mean: the ways that ``--transport auto`` has, and what is told of them."""

import logging
import os
from pathlib import Path

from pdkv.agent.paths import PathRequirement
from pdkv.daemons.link import WorkerSettings
from pdkv.errors import ConfigError, TransportError
from pdkv.transport.auto import AutoTransport, Way
from pdkv.transport.base import Transport
from pdkv.transport.nixl import NixlOptions, NixlTransport
from pdkv.transport.nvlink import NvlinkTransport
from pdkv.transport.shm import ShmTransport
from pdkv.transport.sockets import SocketOptions, SocketTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport

log = logging.getLogger("pdkv.daemons.transport_choice")

_PORTS = "UCX_TCP_PORT_RANGE"

_CARDS = Path("/sys/class/infiniband")


def make_transport(settings: WorkerSettings) -> Transport:
    """``--transport auto``: a mapping of the peer's memory (a GPU's, the host's) on the same host, RDMA where both have
    it, else TCP, through pinned host memory where it is a GPU's. Whoever says what UCX is to use (``--ucx-tls``) means
    UCX. NIXL is not among what ``auto`` tries: whoever standardises on it says so. Raises ``TransportError`` when what
    was chosen cannot start."""
    match settings.transport:
        case "auto" if settings.ucx_tls is None:
            return AutoTransport(_ways(settings))
        case "auto" | "ucx":
            return _ucx(settings)
        case "nixl":
            return NixlTransport(NixlOptions(tls=settings.ucx_tls))
        case "nvlink":
            return NvlinkTransport(settings.nvlink_blocks)
        case "shm":
            return ShmTransport()
        case "sockets":
            return _sockets(settings)
        case unknown:
            raise ConfigError(f"transport {unknown!r} is not one of auto, nixl, nvlink, shm, sockets, ucx")


def describe(transport: Transport) -> str:
    """One line: what it is, of which version, and where it was found."""
    if isinstance(transport, AutoTransport):
        return f"auto: {'; '.join(describe(way.transport) for way in transport.ways)}"
    if isinstance(transport, UcxTransport):
        return f"ucx {transport.library.version} from {transport.library.source}, {transport.library.path}"
    if isinstance(transport, NixlTransport):
        return f"nixl {transport.package.version} ({transport.package.name}), with its own UCX"
    return transport.name


def _ways(settings: WorkerSettings) -> list[Way]:
    """Those that ``--require-transport`` allows. UCX is always there: it alone knows what it can reach."""
    required = PathRequirement(settings.require_transport)
    ways = []
    if settings.device == "cuda" and required.allows("cuda_ipc"):
        ways.append(Way(NvlinkTransport(settings.nvlink_blocks), "cuda_ipc"))
    if required.allows("shm"):
        ways.append(Way(ShmTransport(), "shm"))
    if required.allows("tcp"):
        ways.append(Way(_sockets(settings), "tcp"))
    try:
        ways.append(_ucx_way(settings))
    except TransportError as error:
        if not ways or settings.ucx_library is not None:
            for way in ways:
                way.transport.close()
            raise
        log.warning(f"going without UCX, and so without RDMA: {error}")
    return ways


def _ucx_way(settings: WorkerSettings) -> Way:
    """Without network cards UCX carries a GPU's memory by mapping it, or not at all: its TCP would copy it piece by
    piece, and could keep whoever meets a firewall waiting. Sockets stage it."""
    maps_only = settings.device == "cuda" and not _has_cards()
    ucx = _ucx(settings, tls="^tcp,cma,sysv" if maps_only else None)
    if ucx.library.has_infiniband and _has_cards():
        return Way(ucx, "rdma")
    return Way(ucx, "cuda_ipc" if maps_only else "tcp")


def _has_cards() -> bool:
    return _CARDS.is_dir() and any(_CARDS.iterdir())


def _ucx(settings: WorkerSettings, tls: str | None = None) -> UcxTransport:
    tls = settings.ucx_tls or tls
    return UcxTransport(UcxOptions(tls=tls, library=settings.ucx_library, cuda=settings.device == "cuda"))


def _sockets(settings: WorkerSettings) -> SocketTransport:
    """Listens where the control channel does: whoever is to reach one is to reach the other."""
    host = settings.control_listen.removeprefix("tcp://").rpartition(":")[0].strip("[]")
    ports = _data_ports(os.environ.get(_PORTS, ""))
    return SocketTransport(SocketOptions(listen=host, advertise=settings.advertise_host, ports=ports))


def _data_ports(text: str) -> tuple[int, int]:
    """The ports that a firewall lets through: UCX has a variable for them, and one for both is enough."""
    if not text:
        return 0, 0
    first, _, last = text.partition("-")
    try:
        return int(first), int(last or first)
    except ValueError:
        raise ConfigError(f"{_PORTS}={text!r} is no range of ports; write it as 7401-7499") from None
