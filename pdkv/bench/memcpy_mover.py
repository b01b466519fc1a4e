"""The ceilings: one thread copies the same bytes from one mapping to the other; one copy from GPU to GPU."""

import ctypes
import time

import msgspec

from pdkv.bench.memories import Memory, PeerCopier
from pdkv.bench.mover import Mover, Role, SpanTable, Timing


class MemcpyMover(Mover):
    """Both memories in one process; its "address" is the source's memory."""

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        self._from = 0
        self._copies: list[tuple[int, int, int]] = []

    def address(self) -> bytes:
        return b""

    def meet(self, address: bytes) -> None:
        """``address``: the source's ``Memory`` in this process."""
        self._from = msgspec.json.decode(address, type=Memory).address

    def load(self, spans: SpanTable) -> None:
        self._copies = [
            (self.memory.address + local, self._from + remote, length) for remote, local, length in spans.T.tolist()
        ]

    def move(self) -> Timing:
        began = time.perf_counter()
        for to, source, length in self._copies:
            ctypes.memmove(to, source, length)
        return Timing(0.0, time.perf_counter() - began)

    def close(self) -> None:
        self._copies = []


class PeerCopyMover(Mover):
    """Both GPUs' memories in one process, without another process's mapping between them. One copy a span."""

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        self._copier: PeerCopier | None = None
        self._spans: list[tuple[int, int, int]] = []

    def address(self) -> bytes:
        return b""

    def meet(self, address: bytes) -> None:
        """``address``: the source's ``Memory`` in this process."""
        self._copier = PeerCopier(self.memory, msgspec.json.decode(address, type=Memory))

    def load(self, spans: SpanTable) -> None:
        self._spans = [tuple(span) for span in spans.T.tolist()]

    def move(self) -> Timing:
        assert self._copier is not None, "it meets before it moves"
        began = time.perf_counter()
        for remote, local, length in self._spans:
            self._copier.post(remote, local, length)
        posted = time.perf_counter()
        self._copier.wait()
        return Timing(posted - began, time.perf_counter() - posted)

    def close(self) -> None:
        self._spans = []
