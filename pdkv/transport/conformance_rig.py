"""What the checks work with: a reader with a destination, its targets, and the bookkeeping of completions."""

import select
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

import numpy as np

from pdkv.schema import Int64Array, ReadBatch
from pdkv.transport.base import Completion, PeerId, ReadId, ReadStatus, Transport
from pdkv.transport.conformance_target import (
    MEMORY_SIZES,
    PATIENCE_S,
    Bytes,
    LocalTarget,
    RemoteTarget,
    SpawnedTarget,
    Target,
    TransportSpec,
    pattern,
)

Start = Callable[[TransportSpec, int], RemoteTarget]
"""Makes a target of a seed in a process of its own."""

POISON = 0xEE
"""What destinations hold before a read; no target holds it."""


class ConformanceFailure(AssertionError):
    """A promise of ``Transport`` that the transport under test broke."""


def require(kept: bool, promise: str) -> None:
    if not kept:
        raise ConformanceFailure(promise)


class Rig:
    """One reader and its targets, for one check. A context manager: everything made through it ends with it.

    ``start`` makes a target in a process of its own.
    """

    def __init__(self, spec: TransportSpec, start: Start = SpawnedTarget) -> None:
        self.spec = spec
        self._start = start
        self.reader: Transport = spec.make()
        self.destination = spec.allocate(2 * MEMORY_SIZES[0])
        self.destination.fill(POISON)
        self.reader.register(self.destination.memory)
        self.completions: dict[ReadId, Completion] = {}
        self._targets: list[Target] = []
        self._submitted: set[ReadId] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reader.close()
        for target in self._targets:
            target.close()

    # ---- targets ----

    def target(self, seed: int = 1) -> Target:
        made: Target = self.spawn(seed) if self.spec.separate_process else LocalTarget(self.spec, seed)
        if isinstance(made, LocalTarget):
            self._targets.append(made)
        return made

    def spawn(self, seed: int = 1) -> RemoteTarget:
        made = self._start(self.spec, seed)
        self._targets.append(made)
        return made

    def connect(self, target: Target) -> PeerId:
        return self.reader.connect(target.address)

    def expected(self, target: Target, memory: int) -> Bytes:
        return pattern(target.seed, memory)

    # ---- reads ----

    def batch(self, memory: Int64Array, remote: Int64Array, offset: Int64Array, length: Int64Array) -> ReadBatch:
        """A batch whose destinations are offsets into ``destination``."""
        return ReadBatch(memory=memory, remote=remote, local=self.destination.memory.address + offset, length=length)

    def span(self, memory: int, remote: int, offset: int, length: int) -> ReadBatch:
        return self.batch(*(np.array([value], dtype=np.int64) for value in (memory, remote, offset, length)))

    def submit(self, peer: PeerId, batch: ReadBatch) -> ReadId:
        read = self.reader.submit(peer, batch)
        require(read not in self._submitted, f"read id {read} was given twice")
        self._submitted.add(read)
        return read

    def poll(self) -> None:
        for completion in self.reader.poll():
            require(completion.read in self._submitted, f"a completion for {completion.read}, which nobody submitted")
            require(completion.read not in self.completions, f"read {completion.read} was completed twice")
            self.completions[completion.read] = completion

    def wait(self, *reads: ReadId) -> list[Completion]:
        """Sleep on ``fileno`` until these reads have completed."""
        deadline = time.monotonic() + PATIENCE_S
        while not all(read in self.completions for read in reads):
            missing = [read for read in reads if read not in self.completions]
            left = deadline - time.monotonic()
            require(left > 0, f"{len(missing)} of {len(reads)} reads never completed, among them {missing[0]}")
            select.select([self.reader.fileno()], [], [], left)
            self.poll()
        return [self.completions[read] for read in reads]

    def read_well(self, peer: PeerId, target: Target, batch: ReadBatch) -> None:
        """Submit, wait, and require OK and every byte."""
        completion = self.wait(self.submit(peer, batch))[0]
        require(completion.status is ReadStatus.OK, f"a good read ended as {completion}")
        self.verify(target, batch)

    def verify(self, target: Target, batch: ReadBatch) -> None:
        """Require that the destination holds the target's bytes."""
        if batch.length.size == 0:
            return
        base = int(batch.local.min())
        held = self.destination.look(
            base - self.destination.memory.address, int((batch.local + batch.length).max()) - base
        )
        for memory, remote, local, length in zip(
            batch.memory.tolist(), batch.remote.tolist(), batch.local.tolist(), batch.length.tolist(), strict=True
        ):
            got = held[local - base : local - base + length]
            wanted = self.expected(target, memory)[remote : remote + length]
            require(np.array_equal(got, wanted), f"wrong bytes from memory {memory}, offset {remote}, {length} bytes")

    def require_untouched(self, start: int = 0, end: int | None = None) -> None:
        require(bool((self.destination.bytes[start:end] == POISON).all()), "bytes were written that no read asked for")

    def require_still(self, touch: PeerId, target: Target) -> None:
        """Require that the destination no longer changes, over a round trip of another peer's reads."""
        before = self.destination.bytes.copy()
        end = before.size
        for _ in range(20):
            self.read_well(touch, target, self.span(1, 0, end - 4096, 4096))
        changed = np.flatnonzero(before[: end - 4096] != self.destination.bytes[: end - 4096])
        require(changed.size == 0, f"{changed.size} bytes landed after the completion that ended their read")
