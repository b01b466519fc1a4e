"""What the two roles of an engine process share: what they act on, and HTTP's word for each failure."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import msgspec

from pdkv.agent.events import DecodeAgentEvent, PrefillAgentEvent
from pdkv.daemons.link import JobFailed, Sampling, ToEngine, ToFront
from pdkv.errors import FailureCode
from pdkv.m3.engine import Engine
from pdkv.m3.requests import EngineEvent
from pdkv.m3.sampling import SamplingParams
from pdkv.metrics import Meter
from pdkv.schema import TransferId

STATUS_OF = {
    FailureCode.CANCELLED: 499,
    FailureCode.DEADLINE: 504,
    FailureCode.DIGEST_MISMATCH: 502,
    FailureCode.INTERNAL: 500,
    FailureCode.KEYS: 502,
    FailureCode.LEASE_EXPIRED: 502,
    FailureCode.MANIFEST: 502,
    FailureCode.NO_CAPACITY: 503,
    FailureCode.PEER_LOST: 502,
    FailureCode.PROBE: 502,
    FailureCode.READ_FAILED: 502,
    FailureCode.SHUTDOWN: 503,
    FailureCode.UNKNOWN_TRANSFER: 502,
}


class EngineParts(msgspec.Struct, frozen=True):
    """What a role acts on. All of it is used from the engine thread only; ``post`` and ``send`` only queue."""

    engine: Engine
    post: Callable[[object], None]
    """To the agent thread."""
    send: Callable[[ToFront], None]
    """To the front."""
    meter: Meter
    """The engine thread's."""


class Role(ABC):
    """One role's bookkeeping between front, engine and agent. Owned by the engine thread."""

    @abstractmethod
    def on_front(self, message: ToEngine, at: float) -> None: ...

    @abstractmethod
    def on_agent(self, event: PrefillAgentEvent | DecodeAgentEvent) -> None: ...

    @abstractmethod
    def on_engine(self, events: Sequence[EngineEvent]) -> None: ...

    @abstractmethod
    def on_time(self, at: float) -> None: ...

    @abstractmethod
    def on_step(self, at: float) -> None:
        """A step of the engine begins. ``at``: of the agent's clock."""


def job_failed(transfer: TransferId, code: FailureCode, message: str, status: int | None = None) -> JobFailed:
    return JobFailed(transfer=transfer, code=code.value, message=message, status=status or STATUS_OF[code])


def sampling_params(asked: Sampling) -> SamplingParams:
    """The same on both roles: P draws the first token, D the others."""
    return SamplingParams(temperature=asked.temperature, seed=asked.seed, top_p=asked.top_p)
