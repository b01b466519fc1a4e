"""How the ucx transport learns of the death of a peer's process, whose mapped memory could still be read."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport.base import PeerId, ReadStatus
from pdkv.transport.conformance_target import SpawnedTarget, TransportSpec
from pdkv.transport.process_life import ProcessHome
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.ucx import _MAGIC, UcxOptions, UcxTransport, _Worker

from .reading import PATIENCE_S, ended, span

SHARED_MEMORY = UcxOptions(tls="posix,self", keepalive_ms=3_600_000)
"""UCX itself finds out nothing before an hour is over."""

SIZE = 4096


class Ends:
    """A reader, and a target of this process, which can say that it lives elsewhere."""

    def __init__(self) -> None:
        self.target, self.reader = UcxTransport(SHARED_MEMORY), UcxTransport(SHARED_MEMORY)
        self.source, self.into = np.full(SIZE, 7, np.uint8), np.zeros(SIZE, np.uint8)
        for transport, array in ((self.target, self.source), (self.reader, self.into)):
            transport.register(LocalMemory(array.ctypes.data, array.size))

    def connect(self, home: ProcessHome | None) -> PeerId:
        address = self.target.address()
        worker = msgspec.msgpack.decode(unseal(_MAGIC, address.address, ""), type=_Worker)
        changed = msgspec.msgpack.encode(msgspec.structs.replace(worker, home=home))
        return self.reader.connect(TransportAddress("ucx", seal(_MAGIC, changed), address.memories))

    def read(self, peer: PeerId):
        self.reader.submit(peer, span(0, self.into.ctypes.data, SIZE))
        return ended(self.reader)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.reader.close()
    made.target.close()


@pytest.fixture
def process() -> Iterator[subprocess.Popen]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def test_bytes_that_come_after_the_death_are_not_taken(ends: Ends, process: subprocess.Popen) -> None:
    """What answers is not what is said to live there: as with mapped memory, bytes come whoever has died."""
    home = ProcessHome.of(process.pid)
    peer, idle = ends.connect(home), ends.connect(home)
    assert ends.read(peer).status is ReadStatus.OK
    process.kill()
    process.wait()
    for number in (peer, peer, idle, ends.connect(home)):
        late = ends.read(number)
        assert late.status is ReadStatus.FAILED
        assert late.error.endswith("is lost: its process has ended")
    assert ends.read(ends.connect(ProcessHome.of(os.getpid()))).status is ReadStatus.OK


def test_a_later_process_of_the_same_number_is_not_the_peer(ends: Ends, process: subprocess.Popen) -> None:
    home = ProcessHome.of(process.pid)
    peer = ends.connect(msgspec.structs.replace(home, started=home.started - 1))
    assert ends.read(peer).error.endswith("its process has ended")


@pytest.mark.parametrize(
    "changes", [{"pid_space": 1}, {"boot_id": "another host's"}, {"pid": -1}, {"pid": 1 << 40}, None]
)
def test_a_process_that_cannot_be_watched_is_read_where_it_answers(ends: Ends, changes: dict | None) -> None:
    """Its memory is not mapped: bytes come from the process itself, and only as long as it lives."""
    own = ProcessHome.of(os.getpid())
    home = None if changes is None else msgspec.structs.replace(own, **changes)
    assert ends.read(ends.connect(home)).status is ReadStatus.OK


def spawned() -> SpawnedTarget:
    options = json.dumps({"tls": SHARED_MEMORY.tls, "keepalive_ms": SHARED_MEMORY.keepalive_ms})
    return SpawnedTarget(TransportSpec("pdkv.transport.conformance:make_ucx", options), seed=1)


def test_a_reads_end_does_not_wait_for_ucx_to_look(ends: Ends) -> None:
    target = spawned()
    try:
        peer = ends.reader.connect(target.address)
        assert ends.read(peer).status is ReadStatus.OK
        target.stop()
        os.waitid(os.P_PID, target._process.pid, os.WSTOPPED)  # all its threads: it leaves the read unanswered
        ends.reader.submit(peer, span(0, ends.into.ctypes.data, SIZE))
        assert not select.select([ends.reader.fileno()], [], [], 0)[0]
        target.kill()
        assert ended(ends.reader).status is ReadStatus.FAILED
    finally:
        target.close()


def test_a_sender_killed_amid_an_element_is_seen_to_be_dead() -> None:
    """It leaves UCX's queue of shared memory with something in it that never becomes whole: the reader's thread finds
    no sleep, in which it would be told. About every second death of these is such a one."""
    reader, into = UcxTransport(SHARED_MEMORY), np.zeros(2 << 20, np.uint8)
    reader.register(LocalMemory(into.ctypes.data, into.size))
    targets = [spawned() for _ in range(4)]
    try:
        for target in targets:
            peer = reader.connect(target.address)
            left = {reader.submit(peer, span(0, into.ctypes.data, into.size)) for _ in range(40)}
            while left:
                assert select.select([reader.fileno()], [], [], PATIENCE_S)[0], f"{len(left)} reads never end"
                left -= {completion.read for completion in reader.poll()}
                os.kill(target._process.pid, signal.SIGKILL)
            reader.close_peer(peer)
    finally:
        reader.close()
        for target in targets:
            target.kill()
