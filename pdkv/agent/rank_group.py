"""All ranks of one D as its agent sees them: an order goes to every rank, one answer comes when each has reported."""

from collections import deque
from collections.abc import Callable, Sequence

from pdkv.agent.paths import worst_path
from pdkv.agent.rank_reads import (
    CloseLink,
    ConnectLink,
    LinkConnected,
    LinkProbed,
    PagesRead,
    ProbeLink,
    RankOrder,
    RankReads,
    RankReport,
    ReadPages,
)
from pdkv.schema import ALL_LAYERS, Incarnation, LayerRange
from pdkv.transport.base import Completion
from pdkv.wire.messages import RankOffer

_Matter = tuple[type[RankReport], int]
"""What reports are gathered by: their kind, and the number of the link or the read."""


class RankGroup:
    """Owned by rank 0's agent thread. ``local`` does rank 0's part; ``others[i]`` carries orders to rank i + 1, whose
    reports come back through ``hear``.

    Answers have the types of the reports, summed over the ranks; they queue up until ``take``, so that no order is
    answered while it is being given. An error of any rank is an error of the answer.
    """

    def __init__(self, local: RankReads, others: Sequence[Callable[[RankOrder], None]] = ()) -> None:
        self.local = local
        self._others = tuple(others)
        self._gathered: dict[_Matter, dict[int, RankReport]] = {}
        self._answers: deque[RankReport] = deque()
        self._next_link = 1
        self._next_read = 1
        self._reading: set[int] = set()

    @property
    def size(self) -> int:
        return 1 + len(self._others)

    @property
    def num_reads_outstanding(self) -> int:
        """Reads, not counting probes, that some rank has not ended yet."""
        return len(self._reading)

    def connect(self, incarnation: Incarnation, offers: tuple[RankOffer, ...]) -> int:
        """Open a link from every rank; returns its number. Answered by ``LinkConnected``."""
        link = self._next_link
        self._next_link += 1
        self._order(ConnectLink(link, incarnation, offers))
        return link

    def probe(self, link: int) -> None:
        """Answered by ``LinkProbed``. The caller never has two probes under way: ranks have one pair of pages each."""
        self._order(ProbeLink(link))

    def read(
        self,
        link: int,
        source_pages: tuple[int, ...],
        local_pages: tuple[int, ...],
        layers: LayerRange = ALL_LAYERS,
    ) -> int:
        """Read layers of pages, each rank its own regions of them; returns the read's number. Answered by
        ``PagesRead``."""
        read = self._next_read
        self._next_read += 1
        self._reading.add(read)
        self._order(ReadPages(link, read, source_pages, local_pages, layers))
        return read

    def close(self, link: int) -> None:
        """Close the link on every rank, by force. Reads under way are answered when the last rank's have ended."""
        self._order(CloseLink(link))

    def on_completions(self, completions: Sequence[Completion]) -> None:
        """What rank 0's transport returned."""
        for report in self.local.on_completions(completions):
            self.hear(0, report)

    def hear(self, rank: int, report: RankReport) -> None:
        """One rank's report."""
        matter = (type(report), report.read if isinstance(report, PagesRead) else report.link)
        gathered = self._gathered.setdefault(matter, {})
        assert rank not in gathered, f"rank {rank} reports twice of {matter}"
        gathered[rank] = report
        if len(gathered) == self.size:
            del self._gathered[matter]
            self._answers.append(_summed([gathered[rank] for rank in range(self.size)]))
            if isinstance(report, PagesRead):
                self._reading.discard(report.read)

    def take(self) -> RankReport | None:
        """The next answer, oldest first; None when there is none yet."""
        return self._answers.popleft() if self._answers else None

    def _order(self, order: RankOrder) -> None:
        for tell in self._others:  # first, for they are further away
            tell(order)
        for report in self.local.obey(order):
            self.hear(0, report)


def _summed(reports: Sequence[RankReport]) -> RankReport:
    """One report for all ranks, given in their order."""
    error = _first_error(reports)
    match reports[0]:
        case LinkConnected(link=link):
            connected = [report for report in reports if isinstance(report, LinkConnected)]
            by_region: dict[str, int] = {}
            for report in connected:
                for name, num_bytes in report.bytes_by_region.items():
                    by_region[name] = by_region.get(name, 0) + num_bytes
            return LinkConnected(link, sum(report.num_regions for report in connected), by_region, error)
        case LinkProbed(link=link):
            probed = [report for report in reports if isinstance(report, LinkProbed)]
            path = worst_path(report.path for report in probed)
            first = next((report.first_wrong for report in probed if report.num_wrong), "")
            note = "; ".join(sorted({report.note for report in probed} - {""}))
            return LinkProbed(link, path, sum(report.num_wrong for report in probed), first, error, note)
        case PagesRead(link=link, read=read):
            read_by_rank = [report for report in reports if isinstance(report, PagesRead)]
            batches = tuple(batch for report in read_by_rank for batch in report.batches)
            return PagesRead(link, read, sum(report.num_bytes for report in read_by_rank), batches, error)


def _first_error(reports: Sequence[RankReport]) -> str:
    for rank, report in enumerate(reports):
        if report.error:
            return f"rank {rank}: {report.error}" if len(reports) > 1 else report.error
    return ""
