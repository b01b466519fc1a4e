"""Whether a batch's spans lie where they may: checked before a byte is read."""

from collections.abc import Callable, Sequence

import numpy as np

from pdkv.schema import LocalMemory, MemoryDescriptor, ReadBatch


def int64_copy(batch: ReadBatch) -> ReadBatch:
    """The batch in arrays of its own."""
    return ReadBatch(*(np.array(a, dtype=np.int64) for a in (batch.memory, batch.remote, batch.local, batch.length)))


def fault_of(batch: ReadBatch, theirs: Sequence[MemoryDescriptor], ours: Sequence[LocalMemory]) -> str:
    """Why the batch (of int64 arrays) is to be refused; empty when it is not."""
    if batch.num_spans == 0 or (len(theirs) == len(ours) == 1 and _fits(batch, theirs[0].length, ours[0])):
        return ""
    lengths = np.array([memory.length for memory in theirs] or [0], dtype=np.int64)
    known = (batch.memory >= 0) & (batch.memory < len(theirs))
    room = lengths[np.where(known, batch.memory, 0)]
    checks: tuple[tuple[str, Callable[[], bool]], ...] = (
        ("the peer has no such memory", lambda: not known.all()),
        ("the length is not positive", lambda: bool((batch.length <= 0).any())),
        (
            "the range lies outside the peer's memory",
            # Subtracting keeps clear of overflow: both sides are non-negative here.
            lambda: bool(((batch.remote < 0) | (batch.length > room) | (batch.remote > room - batch.length)).any()),
        ),
        ("the destination lies outside registered memory", lambda: not _owns(ours, batch)),
    )
    return next((fault for fault, found in checks if found()), "")


def _fits(batch: ReadBatch, size: int, ours: LocalMemory) -> bool:
    """Whether no span is at fault, where both sides have one memory: the same in a few passes, for 300,000 spans cost
    as much time as a GPU takes to copy a GB."""
    shortest, longest = int(batch.length.min()), int(batch.length.max())
    if batch.memory.any() or shortest <= 0 or longest > min(size, ours.length):
        return False
    sides = (batch.remote, 0, size), (batch.local, ours.address, ours.address + ours.length)
    return all(
        begin <= int(starts.min())
        and int(starts.max()) < end  # so that adding a length cannot overflow
        and int((starts + batch.length).max()) <= end
        for starts, begin, end in sides
    )


def _owns(memories: Sequence[LocalMemory], batch: ReadBatch) -> bool:
    owned = np.zeros(batch.num_spans, dtype=np.bool_)
    for memory in memories:
        offset = batch.local - memory.address
        fits = batch.length <= memory.length
        owned |= (batch.local >= memory.address) & fits & (offset <= memory.length - batch.length)
    return bool(owned.all())
