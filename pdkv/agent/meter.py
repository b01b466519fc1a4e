"""What an agent counts: handshakes, batches of reads, transfers and leases. Owned by the agent thread."""

from collections.abc import Mapping

from pdkv.agent.events import TransferFacts
from pdkv.errors import FailureCode, KeyRefusal
from pdkv.metric_table import (
    CONTROL_REFUSED,
    DIGEST_CHECKS,
    DIGEST_SECONDS,
    FOLLOWED_SECONDS,
    GRANTED_SECONDS,
    HANDSHAKE_SECONDS,
    HANDSHAKES,
    INCARNATION_CHANGES,
    LEASE_AGE,
    LEASES_EXPIRED,
    NO_CODE,
    PATHS,
    PEER_LOSSES,
    PREFILLS_DISCARDED,
    PUBLISH_SECONDS,
    TRANSFER_BYTES,
    TRANSFER_DESCRIPTORS,
    TRANSFER_EXPOSED_SECONDS,
    TRANSFER_FAILURES,
    TRANSFER_OVERLAP,
    TRANSFER_POST_SECONDS,
    TRANSFER_READ_SECONDS,
    TRANSFER_SECONDS,
    TRANSFER_SIZE,
)
from pdkv.metrics import Meter, Series


class AgentMeter:
    """Knows which metric each event belongs to."""

    def __init__(self) -> None:
        self._meter = Meter()

    def welcomed(self, seconds: float | None = None) -> None:
        """A handshake went well; ``seconds`` on the side that began it."""
        self._meter.count(HANDSHAKES, "ok", NO_CODE)
        if seconds is not None:
            self._meter.observe(HANDSHAKE_SECONDS, value=seconds)

    def refused(self, code: FailureCode) -> None:
        """A handshake came to nothing."""
        self._meter.count(HANDSHAKES, "error", code.value)

    def kept_out(self, reason: KeyRefusal) -> None:
        """Keys have kept a connection from standing."""
        self._meter.count(CONTROL_REFUSED, reason.value)

    def posted(self, path: str, num_spans: int, seconds: float) -> None:
        """One batch of reads was submitted."""
        self._meter.observe(TRANSFER_DESCRIPTORS, _known(path), value=num_spans)
        self._meter.observe(TRANSFER_POST_SECONDS, _known(path), value=seconds)

    def followed(self, seconds: float) -> None:
        """So long after a message that allowed reads they were posted."""
        self._meter.observe(FOLLOWED_SECONDS, value=seconds)

    def published(self, seconds: float) -> None:
        """So long after its kernels ended, progress was sent to D."""
        self._meter.observe(PUBLISH_SECONDS, value=seconds)

    def arrived(self, facts: TransferFacts) -> None:
        """A transfer is complete."""
        path = _known(facts.path)
        self._meter.observe(TRANSFER_SECONDS, path, "ok", value=facts.total_s)
        self._meter.observe(TRANSFER_READ_SECONDS, path, value=facts.read_s)
        self._meter.observe(TRANSFER_EXPOSED_SECONDS, path, value=facts.exposed_s)
        self._meter.observe(TRANSFER_OVERLAP, path, value=facts.hidden_fraction)
        self._meter.observe(GRANTED_SECONDS, value=facts.granted_s)
        self._meter.observe(TRANSFER_SIZE, path, value=sum(facts.bytes_by_region.values()))
        for region, num_bytes in facts.bytes_by_region.items():
            self._meter.count(TRANSFER_BYTES, region, path, by=num_bytes)

    def failed(self, path: str, code: FailureCode, seconds: float) -> None:
        """A transfer came to nothing."""
        self._meter.observe(TRANSFER_SECONDS, _known(path), "error", value=seconds)
        self._meter.count(TRANSFER_FAILURES, _known(path), code.value)

    def digested(self, seconds: float) -> None:
        """Every rank has the digests of a run of blocks."""
        self._meter.observe(DIGEST_SECONDS, value=seconds)

    def compared(self, checked: Mapping[str, int], mismatched: Mapping[str, int]) -> None:
        """So many digests of each region were compared, and so many of them differed."""
        for region, count in checked.items():
            wrong = mismatched.get(region, 0)
            self._meter.count(DIGEST_CHECKS, region, "ok", by=count - wrong)
            self._meter.count(DIGEST_CHECKS, region, "mismatch", by=wrong)

    def lost(self, code: FailureCode) -> None:
        """A peer that had been ready is gone."""
        self._meter.count(PEER_LOSSES, code.value)

    def returned(self) -> None:
        """A peer has come with another incarnation than before."""
        self._meter.count(INCARNATION_CHANGES)

    def discarded(self) -> None:
        """Pages of a prompt that decode has not asked for are taken back."""
        self._meter.count(PREFILLS_DISCARDED)

    def lease_ended(self, age_s: float) -> None:
        """However it ended."""
        self._meter.observe(LEASE_AGE, value=age_s)

    def lease_expired(self) -> None:
        self._meter.count(LEASES_EXPIRED)

    def series(self) -> tuple[Series, ...]:
        return self._meter.series()


def _known(path: str) -> str:
    return path if path in PATHS else "unknown"
