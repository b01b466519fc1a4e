"""Contestants that lie, fail or die; a child of the race takes one of them for "ucx"."""

import os

from pdkv.bench.mover import Mover, SpanTable, Timing


class Lossy(Mover):
    """Writes something else, and says that all went well."""

    def address(self) -> bytes:
        return b""

    def meet(self, address: bytes) -> None:
        pass

    def load(self, spans: SpanTable) -> None:
        pass

    def move(self) -> Timing:
        self.memory.bytes[:] = 0
        return Timing(0.0, 1e-9)

    def close(self) -> None:
        pass


class Failing(Lossy):
    def move(self) -> Timing:
        raise ZeroDivisionError("inside a foreign library")


class Dying(Lossy):
    def move(self) -> Timing:
        os._exit(9)
