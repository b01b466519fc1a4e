"""The state of an engine process as gauges: pages, requests by stage, leases, peers."""

from pdkv.agent.events import AgentStatistics
from pdkv.m3.requests import EngineStatistics
from pdkv.memory.pages import PoolStatistics
from pdkv.metric_table import (
    BLOCKS_STRANDED,
    BLOCKS_TOTAL,
    BLOCKS_USED,
    CACHE_USAGE,
    DRAFT_TOKENS,
    LEASES_ACTIVE,
    MESSAGES_DROPPED,
    OLDEST_LEASE,
    PATHS,
    PEER_SILENCE,
    PEERS,
    PREFILL,
    PREFIX_BLOCKS,
    PREFIX_EVICTIONS,
    PREFIX_PAGES,
    READS_OUTSTANDING,
    TRANSPORT_SELECTED,
    TRANSPORT_STAGED,
    WAITING,
)
from pdkv.metrics import Meter, Series
from pdkv.transport.sockets import STAGED


def engine_gauges(
    role: str, pool: PoolStatistics, engine: EngineStatistics, agent: AgentStatistics
) -> tuple[Series, ...]:
    """What is so at this moment, from the three owners' own statistics."""
    meter = Meter()
    used = pool.num_usable - pool.num_free
    meter.set(BLOCKS_TOTAL, to=pool.num_usable)
    meter.set(BLOCKS_USED, to=used)
    meter.set(CACHE_USAGE, to=used / pool.num_usable)
    meter.set(PREFIX_PAGES, to=pool.num_kept)
    meter.set(PREFIX_EVICTIONS, to=pool.num_evictions)
    meter.set(PREFIX_BLOCKS, "hit", to=engine.num_blocks_found)
    meter.set(PREFIX_BLOCKS, "miss", to=engine.num_blocks_missed)
    meter.set(WAITING, "queued", to=engine.num_queued)
    meter.set(WAITING, "prefill", to=engine.num_prefilling)
    meter.set(WAITING, "transfer", to=engine.num_holding + engine.num_waiting_for_state)
    meter.set(WAITING, "decode", to=engine.num_decoding)
    ready = [peer for peer in agent.peers if peer.state == "ready"]
    meter.set(PEERS, to=len(ready))
    meter.set(PEER_SILENCE, to=agent.silence_s)
    meter.set(BLOCKS_STRANDED, to=agent.pages_stranded)
    meter.set(MESSAGES_DROPPED, to=agent.messages_dropped)
    if role == PREFILL:
        meter.set(LEASES_ACTIVE, to=agent.leases_active)
        meter.set(OLDEST_LEASE, to=max((lease.view.age_s for lease in agent.leases), default=0.0))
        return meter.series()
    meter.set(DRAFT_TOKENS, "accepted", to=engine.num_drafts_accepted)
    meter.set(DRAFT_TOKENS, "rejected", to=engine.num_drafts - engine.num_drafts_accepted)
    meter.set(READS_OUTSTANDING, to=agent.reads_outstanding)
    for path in PATHS:
        meter.set(TRANSPORT_SELECTED, path, to=sum(peer.path == path for peer in ready))
    meter.set(TRANSPORT_STAGED, to=sum(STAGED in peer.note for peer in ready))
    return meter.series()
