"""What the router counts besides its requests: choices of pairs, new tries, and what workers answer."""

from collections import Counter

from pdkv.daemons.tls import Certificate
from pdkv.daemons.worker_pool import Worker, WorkerPool
from pdkv.metric_table import (
    CERTIFICATE_EXPIRY,
    CIRCUITS,
    CIRCUITS_OPENED,
    DECISIONS,
    RETRIES,
    UPSTREAM_RESPONSES,
    WORKER_RESTARTS,
    WORKERS,
    WORKERS_READY,
)
from pdkv.metrics import Meter, Series


class RouterMetrics:
    """Belongs to the event loop's thread, as its meter does."""

    def __init__(self, pool: WorkerPool, meter: Meter, certificate: Certificate | None = None) -> None:
        """``certificate``: the one that clients see."""
        self._pool = pool
        self._meter = meter
        self._certificate = certificate

    def chosen(self, num_tries_before: int) -> None:
        """A pair was there for a try."""
        self._meter.count(DECISIONS, "pd")
        if num_tries_before:
            self._meter.count(RETRIES)

    def rejected(self) -> None:
        """There was no pair."""
        self._meter.count(DECISIONS, "rejected")

    def answered(self, role: str, status: int) -> None:
        """A worker began to answer."""
        self._meter.count(UPSTREAM_RESPONSES, role, {2: "2xx", 4: "4xx"}.get(status // 100, "5xx"))

    def lost(self, role: str) -> None:
        """A worker could not be reached, or broke off before its answer."""
        self._meter.count(UPSTREAM_RESPONSES, role, "lost")

    async def collect(self) -> tuple[Series, ...]:
        """Everything counted so far, and the pool as it is."""
        for role in WORKERS:
            states = Counter(_circuit(worker) for worker in self._pool.workers() if worker.role == role)
            self._meter.set(WORKERS_READY, role, to=states["closed"] + states["slow"])
            for state in ("closed", "slow", "open"):
                self._meter.set(CIRCUITS, role, state, to=states[state])
            self._meter.set(CIRCUITS_OPENED, role, to=self._pool.num_taken_out[role])
            self._meter.set(WORKER_RESTARTS, role, to=self._pool.num_restarts[role])
        self._meter.set(CERTIFICATE_EXPIRY, to=self._certificate.ends_at() if self._certificate else 0)
        return self._meter.series()


def _circuit(worker: Worker) -> str:
    if worker.info is None:
        return "open"
    return "slow" if worker.is_slow else "closed"
