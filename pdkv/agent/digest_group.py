"""Digests of all ranks of a worker as its agent sees them: an order goes to every rank, one answer comes from all."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import msgspec

from pdkv.agent.rank_digests import DigestPages, PagesDigested, RankDigests
from pdkv.core.residency import BlockRange
from pdkv.schema import TransferId, VerifyPages

Owner = TypeVar("Owner")


class WantedDigests(msgspec.Struct, frozen=True):
    """Blocks of one transfer, and the worker's pages that hold them."""

    transfer: TransferId
    verify: VerifyPages
    blocks: BlockRange
    pages: tuple[int, ...]
    num_tokens: int
    """Of the whole prompt."""


class GatheredDigests(msgspec.Struct, frozen=True):
    """Of every rank, in order."""

    by_rank: tuple[bytes, ...]
    seconds: float
    """Of the slowest."""
    error: str = ""


class DigestGroup(Generic[Owner]):
    """Owned by rank 0's agent thread. ``local`` does rank 0's part; ``others[i]`` carries orders to rank i + 1. All
    report through ``hear``, rank 0 too. Answers come with what was given as their owner, in any order."""

    def __init__(self, local: RankDigests, others: Sequence[Callable[[DigestPages], None]] = ()) -> None:
        self._local = local
        self._others = tuple(others)
        self._next_job = 1
        self._owners: dict[int, Owner] = {}
        self._gathered: dict[int, dict[int, PagesDigested]] = {}
        self._answers: deque[tuple[Owner, GatheredDigests]] = deque()

    def order(self, owner: Owner, wanted: WantedDigests) -> None:
        """Digest pages on every rank. Answered through ``take``."""
        job = self._next_job
        self._next_job += 1
        self._owners[job] = owner
        self._gathered[job] = {}
        order = DigestPages(job, wanted.transfer, wanted.verify, wanted.blocks.start, wanted.pages, wanted.num_tokens)
        for tell in self._others:
            tell(order)
        self._local.obey(order)

    def hear(self, rank: int, report: PagesDigested) -> None:
        """One rank's digests."""
        gathered = self._gathered[report.job]
        assert rank not in gathered, f"rank {rank} reports twice of digests {report.job}"
        gathered[rank] = report
        if len(gathered) == 1 + len(self._others):
            del self._gathered[report.job]
            reports = [gathered[rank] for rank in sorted(gathered)]
            error = next((f"rank {rank}: {report.error}" for rank, report in enumerate(reports) if report.error), "")
            answer = GatheredDigests(
                tuple(report.digests for report in reports), max(report.seconds for report in reports), error
            )
            self._answers.append((self._owners.pop(report.job), answer))

    def take(self) -> tuple[Owner, GatheredDigests] | None:
        """The next answer, oldest first; None when there is none yet."""
        return self._answers.popleft() if self._answers else None

    def close(self) -> None:
        """End rank 0's thread; the others' end with their ranks."""
        self._local.close()
