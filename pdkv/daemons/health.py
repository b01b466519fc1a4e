"""What liveness and readiness of a worker hang on, as named conditions; the router's are in ``router_health``."""

import asyncio
import contextlib
import time
from typing import Protocol

import msgspec

from pdkv.daemons.engine_link import EngineGoneError, EngineLink
from pdkv.daemons.lifecycle import Lifecycle
from pdkv.daemons.link import Beat

_BEAT_EVERY_S = 1.0


class Condition(msgspec.Struct, frozen=True):
    name: str
    ok: bool
    message: str = ""
    """What is wrong, for people."""


class Health(Protocol):
    """What a daemon knows of itself. Liveness never depends on another machine or daemon."""

    def live(self) -> list[Condition]: ...

    def ready(self) -> list[Condition]: ...

    def started(self) -> list[Condition]:
        """What has to come once in a daemon's life, and stays."""
        ...


def holds(conditions: list[Condition]) -> bool:
    return all(condition.ok for condition in conditions)


class WorkerHealth:
    """A worker is live while its engine process answers and both of its threads come round.

    Belongs to the event loop's thread. ``stall_timeout_s``: how long a thread may take for one turn.
    """

    def __init__(self, link: EngineLink, lifecycle: Lifecycle, stall_timeout_s: float) -> None:
        self._link = link
        self._lifecycle = lifecycle
        self._stall_timeout_s = stall_timeout_s
        self._beat = Beat(0, 0.0, 0.0)
        self._heard_at = time.monotonic()

    async def watch(self) -> None:
        """Ask for beats, again and again, once the engine process listens."""
        while True:
            if self._link.ready is None:
                self._heard_at = time.monotonic()
            else:
                with contextlib.suppress(EngineGoneError):
                    self._beat = await self._link.beat()
                    self._heard_at = time.monotonic()
            await asyncio.sleep(_BEAT_EVERY_S)

    def beat_ages_s(self) -> dict[str, float]:
        """By thread of the engine process: seconds since it last came round, as far as is known."""
        if self._link.ready is None:
            return {"engine": 0.0, "agent": 0.0}
        unheard_s = time.monotonic() - self._heard_at
        return {"engine": self._beat.engine_age_s + unheard_s, "agent": self._beat.agent_age_s + unheard_s}

    def live(self) -> list[Condition]:
        conditions = [Condition("event_loop", True)]
        for thread, age_s in self.beat_ages_s().items():
            told = f"the {thread} thread has not come round for {age_s:.0f} s"
            ok = age_s <= self._stall_timeout_s
            conditions.append(Condition(f"{thread}_thread", ok, "" if ok else told))
        return conditions

    def started(self) -> list[Condition]:
        ready = self._link.ready
        loaded = ready is not None
        registered = ready is not None and ready.num_regions > 0
        return [
            Condition("model_loaded", loaded, "" if loaded else "still loading its model"),
            Condition("regions_registered", registered, "" if registered else "no region is registered yet"),
        ]

    def ready(self) -> list[Condition]:
        live = holds(self.live())
        draining = self._lifecycle.draining
        return [
            *self.started(),
            Condition("engine_progress", live, "" if live else "its engine process does not come round"),
            Condition("not_draining", not draining, "draining" if draining else ""),
        ]

    def problem(self) -> str:
        """Why it is not ready, empty when it is."""
        return "; ".join(condition.message for condition in self.ready() if not condition.ok)
