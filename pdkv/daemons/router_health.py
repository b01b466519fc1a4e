"""What a router's readiness hangs on. Apart from the workers', which so need not load its HTTP client."""

from pdkv.daemons.health import Condition
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.worker_pool import WorkerPool


class RouterHealth:
    """A router is ready while it has a pair of workers to send requests to."""

    def __init__(self, pool: WorkerPool, lifecycle: Lifecycle) -> None:
        self._pool = pool
        self._lifecycle = lifecycle

    def live(self) -> list[Condition]:
        return [Condition("event_loop", True)]

    def started(self) -> list[Condition]:
        """It answers only once it has read its configuration; workers may come later."""
        return [Condition("configured", True)]

    def ready(self) -> list[Condition]:
        missing = self._pool.missing()
        draining = self._lifecycle.draining
        return [
            Condition("workers", not missing, "; ".join(missing)),
            Condition("not_draining", not draining, "draining" if draining else ""),
        ]
