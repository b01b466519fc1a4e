"""The checks of the conformance kit, one function a promise of ``Transport``."""

import select
from collections.abc import Callable

import msgspec
import numpy as np

from pdkv.errors import TransportError
from pdkv.schema import ReadBatch
from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance_rig import POISON, Rig, require
from pdkv.transport.conformance_target import MEMORY_SIZES

Check = Callable[[Rig], None]

MIB = 1 << 20
OK, FAILED, CANCELLED = ReadStatus.OK, ReadStatus.FAILED, ReadStatus.CANCELLED


def address_lists_memories_in_order(rig: Rig) -> None:
    target = rig.target()
    require([m.length for m in target.address.memories] == list(MEMORY_SIZES), "address() lists the memories in order")
    require(target.address.transport == rig.reader.name, "address().transport is the transport's name")
    require(len(rig.reader.address().memories) == 1, "a reader's destination is registered like any memory")


def reads_every_byte(rig: Rig) -> None:
    target = rig.target()
    peer = rig.connect(target)
    rig.read_well(peer, target, rig.span(1, 0, 0, MEMORY_SIZES[1]))
    rig.read_well(peer, target, rig.span(0, 12_345, 2 * MIB + 1, 3 * MIB + 7))
    rig.require_untouched(MEMORY_SIZES[1], 2 * MIB + 1)
    rig.require_untouched(5 * MIB + 8)


def reads_scattered_odd_spans(rig: Rig) -> None:
    """20,000 spans of 1 to 2,047 bytes, from anywhere, to destinations that leave gaps, none of it aligned."""
    target = rig.target()
    random = np.random.default_rng(7)
    count, pitch = 20_000, 2_111
    length = random.integers(1, 2_048, count)
    memory = random.integers(0, 2, count)
    remote = random.integers(0, np.array(MEMORY_SIZES)[memory] - length)
    offset = random.permutation(count) * pitch + random.integers(0, pitch - 2_047, count)
    rig.read_well(rig.connect(target), target, rig.batch(memory, remote, offset, length))
    left = rig.destination.bytes.copy()
    for start, end in zip(offset.tolist(), (offset + length).tolist(), strict=True):
        left[start:end] = POISON
    require(bool((left == POISON).all()), "bytes between the spans were written")


def reads_spans_of_tens_of_mb(rig: Rig) -> None:
    target = rig.target()
    sizes = np.array([20 * MIB + 1, 16 * MIB - 3, 11 * MIB])
    remote = np.array([1, 5 * MIB + 3, 13 * MIB])
    offset = np.concatenate([[3], 3 + np.cumsum(sizes)[:-1]])
    rig.read_well(rig.connect(target), target, rig.batch(np.zeros(3, np.int64), remote, offset, sizes))


def reads_many_batches_at_once(rig: Rig) -> None:
    """Exactly one completion each, in whatever order."""
    target = rig.target()
    peer = rig.connect(target)
    batches = [
        rig.batch(
            np.zeros(n, np.int64), np.arange(n) * 4_099 + i, i * 165_000 + np.arange(n) * 4_001, np.full(n, 4_001)
        )
        for i, n in enumerate(np.resize([1, 40, 3, 17], 300).tolist())
    ]
    reads = [rig.submit(peer, batch) for batch in batches]
    bad = [c for c in rig.wait(*reads) if c.status is not OK]
    require(not bad, f"{len(bad)} good batches among many did not complete OK, the first: {bad[:1]}")
    for batch in batches:
        rig.verify(target, batch)
    rig.poll()
    require(len(rig.completions) == len(batches), "a batch was completed more than once")


def copies_the_arrays(rig: Rig) -> None:
    """``submit`` is done with the batch's arrays when it returns."""
    target = rig.target()
    n = 2_000
    memory, remote, offset, length = (
        np.zeros(n, np.int64),
        np.arange(n) * 5_000,
        np.arange(n) * 5_000,
        np.full(n, 4_999),
    )
    batch = rig.batch(memory, remote, offset, length)
    wanted = ReadBatch(*(array.copy() for array in (batch.memory, batch.remote, batch.local, batch.length)))
    read = rig.submit(rig.connect(target), batch)
    for array in (batch.memory, batch.remote, batch.local, batch.length):
        array[:] = -1
    require(rig.wait(read)[0].status is OK, "a batch was not OK after its arrays were overwritten by the caller")
    rig.verify(target, wanted)


def completes_empty_batch(rig: Rig) -> None:
    none = np.empty(0, np.int64)
    read = rig.submit(rig.connect(rig.target()), rig.batch(none, none, none, none))
    require(rig.wait(read)[0].status is OK, "an empty batch completes OK")
    rig.require_untouched()


def refuses_bad_ranges(rig: Rig) -> None:
    """Each kind of bad span, alone and behind a good one: FAILED, with a reason, and nothing read."""
    target = rig.target()
    peer = rig.connect(target)
    end, size, most = rig.destination.memory.length, MEMORY_SIZES[0], (1 << 63) - 1
    base = rig.destination.memory.address
    bad = {
        "memory -1": (-1, 0, 0, 8),
        "memory past the last": (2, 0, 0, 8),
        "a negative offset": (0, -1, 0, 8),
        "an offset past the end": (0, size, 0, 1),
        "one byte past the end": (0, size - 7, 0, 8),
        "one byte past the end of the second memory": (1, 0, 0, MEMORY_SIZES[1] + 1),
        "an offset that overflows": (0, most, 0, 8),
        "no length": (0, 0, 0, 0),
        "a negative length": (0, 8, 0, -8),
        "a length that overflows": (0, 8, 0, most),
        "a destination before the memory": (0, 0, -1, 8),
        "a destination past the end": (0, 0, end - 7, 8),
        "a destination in no memory": (0, 0, 1 - base, 8),
        "a destination that overflows": (0, 0, most - base - 3, 8),
    }
    for kind, span in bad.items():
        alone = rig.span(*span)
        behind = rig.batch(*(np.array([good, value]) for good, value in zip((0, 0, 64, 4_096), span, strict=True)))
        for batch in (alone, behind):
            completion = rig.wait(rig.submit(peer, batch))[0]
            require(completion.status is FAILED, f"a span with {kind} ended as {completion}")
            require(bool(completion.error), f"a span with {kind} failed without a reason")
    rig.require_untouched()
    rig.read_well(peer, target, rig.span(0, size - 8, end - 8, 8))


def reads_two_peers_at_once(rig: Rig) -> None:
    targets = [rig.target(seed) for seed in (1, 2)]
    peers = [rig.connect(target) for target in targets]
    submitted = []
    for i in range(40):
        batch = rig.batch(
            np.zeros(8, np.int64), np.arange(8) * MIB + i, i * MIB + np.arange(8) * 130_001, np.full(8, 130_001)
        )
        submitted.append((rig.submit(peers[i % 2], batch), targets[i % 2], batch))
    for read, target, batch in submitted:
        require(rig.wait(read)[0].status is OK, "a good read beside another peer's did not complete OK")
        rig.verify(target, batch)


def fails_when_killed_before(rig: Rig) -> None:
    target = rig.target()
    target.kill()
    completion = rig.wait(rig.submit(rig.connect(target), rig.span(0, 0, 0, MIB)))[0]
    require(completion.status is FAILED, f"a read from a peer that died before ended as {completion}")
    require(bool(completion.error), "a read from a dead peer failed without a reason")


def fails_when_killed_during(rig: Rig) -> None:
    """Batches end OK, with the right bytes, or FAILED; those submitted afterwards fail; another peer is not harmed."""
    target, other = rig.target(1), rig.target(2)
    peer, healthy = rig.connect(target), rig.connect(other)
    batches = [rig.span(0, i, i * 2 * MIB, 2 * MIB - 5) for i in range(20)]
    reads = [rig.submit(peer, batch) for batch in batches]
    rig.wait(reads[0])
    target.kill()
    for completion, batch in zip(rig.wait(*reads), batches, strict=True):
        require(completion.status in (OK, FAILED), f"a read whose peer was killed ended as {completion}")
        if completion.status is OK:
            rig.verify(target, batch)
    late = rig.wait(rig.submit(peer, rig.span(0, 0, 0, 64)))[0]
    require(late.status is FAILED, f"a read from a peer that had died ended as {late}")
    rig.require_still(healthy, other)


def fails_when_killed_after(rig: Rig) -> None:
    target = rig.target()
    peer = rig.connect(target)
    rig.read_well(peer, target, rig.span(0, 0, 0, MIB))
    target.kill()
    completion = rig.wait(rig.submit(peer, rig.span(0, 0, MIB, MIB)))[0]
    require(completion.status is FAILED, f"a read from a peer that had died ended as {completion}")
    rig.reader.close_peer(peer)


def closes_during_read(rig: Rig) -> None:
    """Exactly one completion each, OK or CANCELLED, and no byte lands after them."""
    target = rig.target()
    for turn in range(3):
        peer, other = rig.connect(target), rig.connect(target)
        batches = [rig.span(0, i, i * 2 * MIB, 2 * MIB - 5) for i in range(20)]
        reads = [rig.submit(peer, batch) for batch in batches]
        if turn:
            rig.wait(*reads[: 4 * turn])
        rig.reader.close_peer(peer)
        for completion, batch in zip(rig.wait(*reads), batches, strict=True):
            require(completion.status in (OK, CANCELLED), f"a read whose peer was closed ended as {completion}")
            if completion.status is OK:
                rig.verify(target, batch)
        rig.require_still(other, target)
        rig.reader.close_peer(other)


def closes_stopped_peer(rig: Rig) -> None:
    """A peer that hangs is closed all the same, and what it sends once it goes on lands nowhere."""
    target, other = rig.spawn(1), rig.target(2)
    peer, healthy = rig.connect(target), rig.connect(other)
    rig.read_well(peer, target, rig.span(0, 0, 0, 64))
    target.stop()
    reads = [rig.submit(peer, rig.span(0, 0, i * 4 * MIB, 4 * MIB)) for i in range(8)]
    rig.read_well(healthy, other, rig.span(1, 0, 40 * MIB, 4_096))
    rig.reader.close_peer(peer)
    statuses = {completion.status for completion in rig.wait(*reads)}
    require(statuses <= {OK, CANCELLED}, f"reads from a stopped peer that was closed ended as {statuses}")
    target.resume()
    rig.require_still(healthy, other)
    target.kill()  # whether a target outlives what its reader did while it slept is not the reader's to promise


def closes_twice(rig: Rig) -> None:
    target = rig.target()
    peer = rig.connect(target)
    rig.read_well(peer, target, rig.span(0, 0, 0, 64))
    rig.reader.close_peer(peer)
    rig.reader.close_peer(peer)
    again = rig.connect(target)
    require(again != peer, "the id of a closed peer was used again")
    rig.reader.close_peer(peer)
    rig.read_well(again, target, rig.span(0, 64, 64, 64))


def fails_reads_of_closed_peer(rig: Rig) -> None:
    target = rig.target()
    peer = rig.connect(target)
    rig.reader.close_peer(peer)
    completion = rig.wait(rig.submit(peer, rig.span(0, 0, 0, 64)))[0]
    require(completion.status is FAILED, f"a read from a closed peer ended as {completion}")
    rig.require_untouched()


def refuses_rubbish_addresses(rig: Rig) -> None:
    """Foreign or damaged addresses are a ``TransportError``, never a crash."""
    address = rig.target().address
    damaged = bytes([address.address[0] ^ 0xFF]) + address.address[1:]
    for rubbish in (
        msgspec.structs.replace(address, transport="carrier-pigeon"),
        msgspec.structs.replace(address, address=b""),
        msgspec.structs.replace(address, address=damaged),
    ):
        try:
            rig.reader.connect(rubbish)
        except TransportError:
            continue
        require(False, f"connect took a rubbish address: {rubbish.transport} {rubbish.address[:16]!r}")


def fileno_tells_of_completions(rig: Rig) -> None:
    def readable(timeout: float) -> bool:
        return bool(select.select([rig.reader.fileno()], [], [], timeout)[0])

    target = rig.target()
    peer = rig.connect(target)
    rig.read_well(peer, target, rig.span(0, 0, 0, 64))
    require(not readable(0), "fileno is readable though poll has nothing to return")
    read = rig.submit(peer, rig.span(0, 64, 64, 64))
    require(readable(30.0), "fileno does not become readable when a read completes")
    require(readable(0), "fileno stays readable until poll is called")
    rig.wait(read)
    require(not readable(0), "fileno is readable though poll has returned everything")


def destroys_with_reads_outstanding(rig: Rig) -> None:
    """``close`` ends everything, twice if asked, and nothing lands after it has returned."""
    target = rig.target()
    doomed = rig.spec.make()
    doomed.register(rig.destination.memory)
    peer = doomed.connect(target.address)
    for i in range(16):
        doomed.submit(peer, rig.span(0, i, i * 2 * MIB, 2 * MIB))
    doomed.close()
    doomed.close()
    rig.require_still(rig.connect(target), target)


def tells_its_path(rig: Rig) -> None:
    target = rig.target()
    peer = rig.connect(target)
    require(rig.reader.path(peer) == "unknown", "path is unknown before the first read")
    rig.read_well(peer, target, rig.span(0, 0, 0, MIB))
    path = rig.reader.path(peer)
    require(path == rig.spec.path if rig.spec.path else path != "unknown", f"path says {path}, not {rig.spec.path}")


def serves_without_its_interpreter(rig: Rig) -> None:
    """A target whose interpreter is held up by one long call serves reads meanwhile."""
    target = rig.spawn()
    peer = rig.connect(target)
    rig.read_well(peer, target, rig.span(0, 0, 0, 64))
    target.send("hold-gil")
    require(target.answer() == b"holding\n", "the target takes orders")
    rig.read_well(peer, target, rig.span(0, 0, 0, 8 * MIB))
    require(not target.has_answered(), "the read waited for the target's interpreter")


SEPARATE_PROCESS_CHECKS = frozenset({"closes_stopped_peer", "serves_without_its_interpreter"})
"""Checks that make sense only with the far end in another process."""

CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        address_lists_memories_in_order,
        reads_every_byte,
        reads_scattered_odd_spans,
        reads_spans_of_tens_of_mb,
        reads_many_batches_at_once,
        copies_the_arrays,
        completes_empty_batch,
        refuses_bad_ranges,
        reads_two_peers_at_once,
        fails_when_killed_before,
        fails_when_killed_during,
        fails_when_killed_after,
        closes_during_read,
        closes_stopped_peer,
        closes_twice,
        fails_reads_of_closed_peer,
        refuses_rubbish_addresses,
        fileno_tells_of_completions,
        destroys_with_reads_outstanding,
        tells_its_path,
        serves_without_its_interpreter,
    )
}
