"""The ceiling: one thread copies the same bytes from one mapping to the other."""

import ctypes
import time

from pdkv.bench.mover import Memory, Mover, Role, SpanTable, Timing


class MemcpyMover(Mover):
    """Both memories in one process; its "address" is the source's."""

    def __init__(self, role: Role, memory: Memory) -> None:
        super().__init__(role, memory)
        self._from = 0
        self._copies: list[tuple[int, int, int]] = []

    def address(self) -> bytes:
        return b""

    def meet(self, address: bytes) -> None:
        """``address``: where the source's memory is mapped in this process, in decimal digits."""
        self._from = int(address)

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
