"""What tests of transports share: memory that can be mapped, one span, and the wait for its end."""

import select

import numpy as np

from pdkv.schema import ReadBatch
from pdkv.transport.base import Completion, PeerId, Transport
from pdkv.transport.conformance_target import SharedArray

PATIENCE_S = 60


def filled(size: int, value: int) -> SharedArray:
    array = SharedArray(size)
    array.bytes[:] = value
    return array


def span(remote: int, local: int, length: int, memory: int = 0) -> ReadBatch:
    return ReadBatch(*(np.array([value], dtype=np.int64) for value in (memory, remote, local, length)))


def ended(transport: Transport) -> Completion:
    """The next completion; an error if there is none, or more than one at once."""
    completions: list[Completion] = []
    while not completions:
        assert select.select([transport.fileno()], [], [], PATIENCE_S)[0], "nothing completes"
        completions = transport.poll()
    (completion,) = completions
    return completion


def read(transport: Transport, peer: PeerId, into: SharedArray, length: int) -> Completion:
    """Read the first ``length`` bytes of the peer's first memory to the beginning of ``into``."""
    transport.submit(peer, span(0, into.memory.address, length))
    return ended(transport)
