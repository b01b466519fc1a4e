"""Ranks that are threads of one process: the same code as in processes, for checks and tests that want all in one."""

import socket
import threading
from collections.abc import Callable

from pdkv.daemons.link import BlockingLink, WorkerSettings
from pdkv.daemons.other_ranks import OtherRanks, RankEnd
from pdkv.daemons.rank_link import RankSetup
from pdkv.daemons.rank_side import RankSide
from pdkv.m3.parallel import Group, ThreadGroup, thread_groups
from pdkv.transport.base import Transport

_END_S = 10.0


def thread_ranks(size: int, make_transport: Callable[[], Transport]) -> OtherRanks:
    """Ranks 1 to size - 1, each in a thread of its own, over transports of their own. The caller is rank 0."""
    groups = thread_groups(size)
    members = [_RankThread(group, make_transport) for group in groups[1:]]
    return OtherRanks(members, _Met(groups[0]) if members else None)


class _RankThread:
    """One rank. Its surroundings and, seen from rank 0, its member."""

    def __init__(self, group: ThreadGroup, make_transport: Callable[[], Transport]) -> None:
        ours, theirs = socket.socketpair()
        self.link = BlockingLink(ours)
        self._group = group
        self._make_transport = make_transport
        self._code = 0
        args = (BlockingLink(theirs),)
        self._thread = threading.Thread(target=self._serve, args=args, name=f"pdkv-rank-{group.rank}", daemon=True)
        self._thread.start()

    def ended(self) -> RankEnd:
        self._thread.join(_END_S)
        return RankEnd(f"ended with {self._code}", by_force=False)

    def join(self, _setup: RankSetup) -> Group:
        return self._group

    def make_transport(self, _settings: WorkerSettings) -> Transport:
        return self._make_transport()

    def orphaned(self) -> None:
        self._group.abort()  # it may be waiting in a collective that rank 0 will never join

    def _serve(self, link: BlockingLink) -> None:
        self._code = RankSide(link, self).serve()
        if self._code:
            self._group.abort()


class _Met:
    """Threads share their group from the start."""

    def __init__(self, group: Group) -> None:
        self._group = group

    def open(self) -> int:
        return 0

    def join(self, _device: str) -> Group:
        return self._group
