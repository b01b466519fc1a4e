"""One process of one contestant: takes orders on standard input, answers on standard output, a JSON line each."""

import importlib
import os
import sys
import time

import msgspec
import numpy as np

from pdkv.bench.memories import DriverError, Memory, Place, handle_of, take
from pdkv.bench.mover import MOVERS, MoveError, Mover, Role


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    mover: str
    """A name in ``MOVERS``."""
    role: Role
    place: Place
    source: Place | None = None
    """For the ceiling, whose one process has both memories."""


class Meet(msgspec.Struct, frozen=True, tag="meet"):
    address: bytes


class Load(msgspec.Struct, frozen=True, tag="load"):
    spans_file: str
    """A numpy array [3, spans]."""


class Move(msgspec.Struct, frozen=True, tag="move"):
    pass


class AskCpu(msgspec.Struct, frozen=True, tag="cpu"):
    pass


Order = Begin | Meet | Load | Move | AskCpu


class Answer(msgspec.Struct, frozen=True):
    """To any order; ``error`` is empty when it was carried out."""

    error: str = ""
    address: bytes = b""
    handles: tuple[bytes, ...] = ()
    """To ``Begin``: by which its GPU memory can be opened, and the source's where it has both."""
    post_s: float = 0.0
    wire_s: float = 0.0
    cpu_s: float = 0.0
    """Of this process since it began, all threads."""


def make_mover(order: Begin, memory: Memory) -> Mover:
    module, _, name = MOVERS[order.mover].partition(":")
    kind: type[Mover] = getattr(importlib.import_module(module), name)
    return kind(order.role, memory)


class Contestant:
    """Carries out orders. Its mover is made by the first."""

    def __init__(self) -> None:
        self._mover: Mover | None = None
        self._memories: list[Memory] = []

    def obey(self, order: Order) -> Answer:
        if isinstance(order, Begin):
            return self._begin(order)
        assert self._mover is not None, "begin comes first"
        match order:
            case Meet():
                self._mover.meet(order.address)
            case Load():
                self._mover.load(np.load(order.spans_file))
            case Move():
                timing = self._mover.move()
                return Answer(post_s=timing.post_s, wire_s=timing.wire_s)
            case AskCpu():
                return Answer(cpu_s=time.process_time())
        return Answer()

    def _begin(self, order: Begin) -> Answer:
        self._memories = [take(place) for place in (order.place, order.source) if place is not None]
        self._mover = make_mover(order, self._memories[0])
        address = self._mover.address()
        if order.source is not None:
            source = self._memories[1]
            address = msgspec.json.encode(
                Memory(address=source.address, num_bytes=source.num_bytes, device=source.device)
            )
        return Answer(address=address, handles=tuple(handle_of(memory) for memory in self._memories))

    def close(self) -> None:
        if self._mover is not None:
            self._mover.close()


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries print what they like
    contestant = Contestant()
    for line in sys.stdin.buffer:
        order: Order = msgspec.json.decode(line, type=Order)
        try:
            answer = contestant.obey(order)
        except (MoveError, DriverError) as error:
            answer = Answer(error=str(error))
        except Exception as error:  # noqa: BLE001  a foreign library may raise anything; it is told, and scores nothing
            answer = Answer(error=f"{type(error).__name__}: {error}")
        answers.write(msgspec.json.encode(answer) + b"\n")
        answers.flush()
    contestant.close()
    answers.flush()
    os._exit(0)  # foreign libraries crash or hang in their destructors


if __name__ == "__main__":
    main()
