"""Ranks that are processes: forked from the engine process before it has a thread, and ended with it."""

import logging
import os
import signal
import socket
import time

from pdkv.daemons import lifeline
from pdkv.daemons.link import BlockingLink, WorkerSettings
from pdkv.daemons.logs import configure_logging
from pdkv.daemons.other_ranks import OnLost, OtherRanks, RankEnd
from pdkv.daemons.rank_link import RankSetup
from pdkv.daemons.rank_share import device_of
from pdkv.daemons.rank_side import RankSide
from pdkv.daemons.transport_choice import make_transport
from pdkv.m3.parallel import LOOPBACK, DistributedGroup, Group, find_store, join_group, open_store
from pdkv.transport.base import Transport

_LOG = logging.getLogger("pdkv.rank")
_REAP_S = 2.0
_REAP_EVERY_S = 0.01


def fork_ranks(settings: WorkerSettings, front: BlockingLink, at_worst: OnLost) -> OtherRanks:
    """Make the processes of ranks 1 to tp_size - 1. The caller is rank 0.

    Call it from the main thread while that is the only one, and before CUDA is touched: a fork copies no other thread.
    ``front``: the caller's link, which its children must not hold open. ``at_worst``: see ``OtherRanks``.
    """
    members: list[_Child] = []
    for rank in range(1, settings.tp_size):
        members.append(_fork(settings, rank, [front, *(member.link for member in members)]))
    return OtherRanks(members, _StoreMeeting(settings.tp_size) if members else None, at_worst)


def _fork(settings: WorkerSettings, rank: int, inherited: list[BlockingLink]) -> "_Child":
    ours, theirs = socket.socketpair()
    parent = os.getpid()
    pid = os.fork()
    if pid:
        theirs.close()
        return _Child(pid, BlockingLink(ours))
    code = 1
    try:
        lifeline.die_with_parent(parent)
        ours.close()
        for link in inherited:
            link.release()
        configure_logging(settings.log_level, f"{settings.role} rank {rank}")
        code = RankSide(BlockingLink(theirs), _ProcessSurroundings()).serve()
    finally:
        os._exit(code)  # never back into the caller's frames, which belong to rank 0


class _Child:
    """A forked rank, seen from rank 0. Reaped by whoever asks how it ended."""

    def __init__(self, pid: int, link: BlockingLink) -> None:
        self.link = link
        self._pid = pid

    def ended(self) -> RankEnd:
        deadline = time.monotonic() + _REAP_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
            if pid:
                return _told(os.waitstatus_to_exitcode(status))
            time.sleep(_REAP_EVERY_S)
        return RankEnd(f"(process {self._pid}) closed its link and does not end", by_force=False)


def _told(code: int) -> RankEnd:
    if code >= 0:
        return RankEnd(f"exited with {code}", by_force=True)
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    return RankEnd(f"was killed by {name}", by_force=True)


class _StoreMeeting:
    """Rank 0's end: a store that lives as long as this object, on a free port of the loopback interface."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._store: object = None
        self._group: DistributedGroup | None = None

    def open(self) -> int:
        self._store = store = open_store()
        return int(store.port)

    def join(self, device: str) -> Group:
        self._group = join_group(self._store, 0, self._size, device)  # type: ignore[arg-type]
        return self._group


class _ProcessSurroundings:
    """What a rank finds around it in a process of its own."""

    def join(self, setup: RankSetup) -> Group:
        settings = setup.settings
        self._store = find_store(LOOPBACK, setup.store_port)
        return join_group(self._store, setup.rank, settings.tp_size, device_of(settings, setup.rank))

    def make_transport(self, settings: WorkerSettings) -> Transport:
        return make_transport(settings)

    def orphaned(self) -> None:
        os._exit(0)  # this rank may be waiting in a collective that nobody will ever join
