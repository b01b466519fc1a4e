"""The seam of the bench: what a contestant does on either side of a move. Needs nothing but numpy and msgspec."""

from abc import ABC, abstractmethod
from typing import ClassVar

import msgspec
import numpy as np
import numpy.typing as npt

from pdkv.bench.memories import Memory

SOURCE, READER = "source", "reader"
"""The side that holds the bytes, and the side that gets them."""

MOVERS = {
    "pdkv": "pdkv.bench.pdkv_mover:PdkvMover",
    "ucx": "pdkv.bench.pdkv_mover:UcxMover",
    "nixl": "pdkv.bench.nixl_mover:NixlMover",
    "mooncake": "pdkv.bench.mooncake_mover:MooncakeMover",
    "ceiling": "pdkv.bench.memcpy_mover:MemcpyMover",
    "gpu-pdkv": "pdkv.bench.pdkv_mover:PdkvMover",
    "gpu-ucx": "pdkv.bench.pdkv_mover:UcxMover",
    "gpu-nixl": "pdkv.bench.nixl_mover:NixlMover",
    "gpu-ceiling": "pdkv.bench.memcpy_mover:PeerCopyMover",
}
"""By the contestant's name, after "gpu-" for the memory of GPUs. Imported only in its own processes, whose environment
may lack the others."""

SpanTable = npt.NDArray[np.int64]
"""[3, spans]: offset in the source's memory, offset in the reader's, length."""


class MoveError(Exception):
    """A contestant that could not do what was asked; scores nothing and is shown so."""


class Timing(msgspec.Struct, frozen=True):
    """Of one move: until everything was handed over, and from then until every byte was there."""

    post_s: float
    wire_s: float


class Role(msgspec.Struct, frozen=True):
    """Which side of which move a contestant's process is."""

    path: str
    """"shm", "tcp" or "cuda_ipc"; "memcpy" for the ceiling over host memory."""
    side: str
    host: str = "127.0.0.1"
    """Address that the source listens on."""
    operation: str = "read"
    """"read": the reader pulls; "write": the source pushes. For contestants that can do both."""


class Mover(ABC):
    """One contestant in one of its two processes. Everything but ``move`` is set-up and is not timed."""

    needs_tools: ClassVar[bool] = False
    """Runs in the environment of the bench's tools, not in ours."""

    def __init__(self, role: Role, memory: Memory) -> None:
        self.role = role
        self.memory = memory

    @abstractmethod
    def address(self) -> bytes:
        """What the other side needs to meet this one."""

    @abstractmethod
    def meet(self, address: bytes) -> None:
        """Connect. Called on both sides with the other's address."""

    @abstractmethod
    def load(self, spans: SpanTable) -> None:
        """What the next moves move; whatever is prepared once for many moves is prepared here."""

    @abstractmethod
    def move(self) -> Timing:
        """Move all spans. Called on the reader, or on the source for operation "write". Raises ``MoveError``."""

    @abstractmethod
    def close(self) -> None: ...
