"""Gathers what a worker's two processes have counted, for its admin port."""

import asyncio
import contextlib

from pdkv.daemons.engine_link import EngineGoneError, EngineLink
from pdkv.daemons.health import WorkerHealth
from pdkv.metric_table import BEAT_AGE, ENGINE_INFO, REGION_BYTES, REGIONS_REGISTERED
from pdkv.metrics import Meter, Series

_FRESH_WITHIN_S = 1.0
"""A scrape waits no longer for an engine in the middle of a step; it gets the last values then."""


class WorkerMetrics:
    """Belongs to the event loop's thread, as ``meter`` does, which holds what the front itself has counted."""

    def __init__(self, link: EngineLink, health: WorkerHealth, meter: Meter, model: str) -> None:
        self._link = link
        self._health = health
        self._meter = meter
        self._model = model
        self._engine: list[Series] = []

    async def collect(self) -> list[Series]:
        """Everything that this worker has counted."""
        ready = self._link.ready
        if ready is not None:
            sizes = (str(ready.block_size), str(ready.tp_size))
            self._meter.set(ENGINE_INFO, self._model, ready.manifest_digest[:12], *sizes, to=1)
            for region in ready.regions:
                self._meter.set(REGION_BYTES, region.name, to=region.bytes_per_token)
                self._meter.set(REGIONS_REGISTERED, region.name, to=region.num_regions)
            with contextlib.suppress(EngineGoneError, TimeoutError):
                async with asyncio.timeout(_FRESH_WITHIN_S):
                    self._engine = (await self._link.status(with_series=True)).series
        for thread, age_s in self._health.beat_ages_s().items():
            self._meter.set(BEAT_AGE, thread, to=age_s)
        return [*self._meter.series(), *self._engine]
