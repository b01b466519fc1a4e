"""Looks at a prefill worker as a decode worker would: manifests compared, path probed, bandwidth measured by size."""

import time

import msgspec
import numpy as np
import zmq

from pdkv.agent.loop import now
from pdkv.agent.paths import PathRequirement
from pdkv.agent.peer_links import LinkState, PeerLink, PeerLinks
from pdkv.agent.rank_group import RankGroup
from pdkv.agent.rank_reads import LinkConnected, LinkProbed, RankReads
from pdkv.daemons.assembly import enroll, new_incarnation
from pdkv.daemons.control_keys import channel_security
from pdkv.daemons.description import fetch_info
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.model_settings import config_of
from pdkv.daemons.transport_choice import make_transport
from pdkv.errors import HandshakeError, PdkvError
from pdkv.memory.arena import Arena
from pdkv.schema import Incarnation, ReadBatch
from pdkv.transport.base import Completion, PeerId, ReadStatus, Transport
from pdkv.wire.channel import Channel

_SPAN_BYTES = (2 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20)
_BATCH_BYTES = 64 << 20
_MOST_SPANS = 4096
_REPEATS = 3
_PATIENCE_S = 30.0


class SweepPoint(msgspec.Struct, frozen=True):
    """Spans of one size read in one batch: the median of some repeats."""

    span_bytes: int
    num_spans: int
    gigabytes_per_s: float


class PeerSurvey(msgspec.Struct, frozen=True):
    url: str
    incarnation: str
    path: str
    probe_gigabytes_per_s: float
    sweep: tuple[SweepPoint, ...]
    note: str = ""
    """What the transport says of the way beyond ``path``."""


def survey(url: str, settings: WorkerSettings) -> PeerSurvey:
    """Shake hands with the prefill worker at ``url`` with the model of ``settings``, and read its probe pages.

    Nothing of a request is read. Raises ``HandshakeError`` for what keeps the two apart.
    """
    info = fetch_info(url)
    if info.role != "prefill" or not info.ready:
        state = "" if info.ready else " that is not ready"
        raise PdkvError(f"{url} is a {info.role} worker{state}; name a prefill worker that is")
    config = config_of(settings)
    transport = make_transport(settings)
    incarnation = new_incarnation()
    channel = Channel(incarnation, channel_security(settings.control_keys), insecure=settings.insecure)
    try:
        memory, identity = enroll(settings, config, transport, incarnation, num_pages=4)
        arena = memory.arena
        ranks = RankGroup(RankReads(transport, identity.manifest, memory.probe, (arena.memory.address,)))
        links = PeerLinks(identity, channel, ranks, PathRequirement(settings.require_transport))
        link = links.get(info.control, Incarnation(int(info.incarnation, 16)), now())
        _wait_until_settled(links, ranks, link, channel, transport)
        if link.state is LinkState.LOST:
            raise HandshakeError(link.error.code, str(link.error))
        assert link.number is not None, "a link that is ready is connected"
        peer, row_bytes = ranks.local.widest_source(link.number)
        sweep = tuple(_measure(size, row_bytes, arena, peer, transport) for size in _SPAN_BYTES if size <= row_bytes)
        links.farewell()
        return PeerSurvey(url, info.incarnation, link.path, link.probe_gbps, sweep, link.note)
    finally:
        transport.close()
        channel.close()


def _wait_until_settled(
    links: PeerLinks, ranks: RankGroup, link: PeerLink, channel: Channel, transport: Transport
) -> None:
    """A decode agent's turns, until the handshake has ended either way; it ends itself by its deadline."""
    while link.state not in (LinkState.READY, LinkState.LOST):
        poller = zmq.Poller()
        for socket in channel.sockets():
            poller.register(socket, zmq.POLLIN)
        poller.register(transport.fileno(), zmq.POLLIN)
        poller.poll(20)
        for received in channel.receive():
            links.on_message(received, now())
        for refused in channel.take_refused():
            links.on_refused(refused)
        ranks.on_completions(transport.poll())
        while (answer := ranks.take()) is not None:
            if isinstance(answer, LinkConnected):
                links.on_connected(answer)
            elif isinstance(answer, LinkProbed):
                links.on_probed(answer, now())
        links.on_time(now())


def _measure(size: int, row_bytes: int, arena: Arena, peer: PeerId, transport: Transport) -> SweepPoint:
    """Read spans of ``size`` bytes out of the first ``row_bytes`` of P's rank, again and again, into our own pages."""
    count = min(_MOST_SPANS, max(1, _BATCH_BYTES // size))
    per_row = row_bytes // size
    remote = (np.arange(count, dtype=np.int64) % per_row) * size
    batch = ReadBatch(
        memory=np.zeros(count, dtype=np.int64),
        remote=remote,
        local=arena.memory.address + remote,
        length=np.full(count, size, dtype=np.int64),
    )
    speeds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        read = transport.submit(peer, batch)
        ended = _wait_for_read(transport)
        if ended.read != read or ended.status is not ReadStatus.OK:
            raise PdkvError(f"reading {count} spans of {size} bytes failed: {ended.error}")
        speeds.append(batch.num_bytes / (time.perf_counter() - started) / 1e9)
    return SweepPoint(size, count, sorted(speeds)[_REPEATS // 2])


def _wait_for_read(transport: Transport) -> Completion:
    poller = zmq.Poller()
    poller.register(transport.fileno(), zmq.POLLIN)
    deadline = time.monotonic() + _PATIENCE_S
    while time.monotonic() < deadline:
        poller.poll(100)
        for completion in transport.poll():
            return completion
    raise PdkvError(f"a read did not end within {_PATIENCE_S:.0f} s")
