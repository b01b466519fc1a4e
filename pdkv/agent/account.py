"""What one transfer takes on D: bytes, spans, and the time of each hop from Acquire to the last byte."""

from pdkv.agent.events import StartTransfer, TransferFacts
from pdkv.agent.peer_links import PeerLink
from pdkv.agent.rank_reads import PagesRead


class Account:
    """Of one transfer. Owned by the agent thread; every time is the caller's clock, in seconds."""

    def __init__(self, start: StartTransfer, link: PeerLink, at: float) -> None:
        """``at``: when Acquire was sent."""
        self._start = start
        self._link = link
        self._started = at
        self._granted: float | None = None
        self._slowest_post_s = 0.0
        self._done: float | None = None
        self._bytes_before_done = 0
        self._landed = at
        self._num_spans = 0
        self._num_bytes = 0
        self._outstanding = 0
        self._reading_since = 0.0
        self._read_s = 0.0

    def granted(self, at: float) -> None:
        """P's pages are known. Repeated copies of that message do not count."""
        if self._granted is None:
            self._granted = at

    def done(self, at: float) -> None:
        """P has computed everything. Repeated copies of that message do not count."""
        if self._done is None:
            self._done = at
            self._bytes_before_done = self._num_bytes

    def posted(self, at: float) -> None:
        """A read was handed to the ranks."""
        if self._outstanding == 0:
            self._reading_since = at
        self._outstanding += 1

    def posted_after(self, seconds: float) -> None:
        """So long after the message that allowed it, a read was handed to the ranks."""
        self._slowest_post_s = max(self._slowest_post_s, seconds)

    def read_ended(self, answer: PagesRead, at: float) -> None:
        """All ranks have ended a read."""
        self._num_spans += sum(batch.num_spans for batch in answer.batches)
        self._outstanding -= 1
        if self._outstanding == 0:
            self._read_s += at - self._reading_since
        if not answer.error:
            self._num_bytes += answer.num_bytes
            self._landed = at

    def seconds(self, at: float) -> float:
        """Since Acquire."""
        return at - self._started

    def facts(self, at: float, cached_tokens: int) -> TransferFacts:
        """Of a transfer that is complete."""
        pages = len(self._start.pages) - self._start.resident_blocks
        done = self._landed if self._done is None else self._done
        return TransferFacts(
            num_pages=pages,
            num_regions=self._link.num_regions,
            num_spans=self._num_spans,
            num_bytes=self._num_bytes,
            bytes_by_region={name: size * pages for name, size in self._link.bytes_by_region.items()},
            bytes_before_done=self._bytes_before_done,
            read_s=self._read_s,
            total_s=at - self._started,
            path=self._link.path,
            peer=self._link.name,
            cached_tokens=cached_tokens,
            resident_pages=self._start.resident_blocks,
            exposed_s=max(0.0, self._landed - done),
            hidden_fraction=self._bytes_before_done / self._num_bytes if self._num_bytes else 1.0,
            granted_s=(self._started if self._granted is None else self._granted) - self._started,
            posted_s=self._slowest_post_s,
            compared_s=max(0.0, at - max(self._landed, done)),
            resident_at=at,
        )
