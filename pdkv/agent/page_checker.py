"""D's comparison of what its ranks have read with what P's ranks wrote, and the words for a difference."""

import logging
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import msgspec

from pdkv.agent.digest_group import DigestGroup, GatheredDigests, WantedDigests
from pdkv.agent.meter import AgentMeter
from pdkv.agent.peer_links import PeerLink
from pdkv.agent.rank_digests import PagesDigested
from pdkv.core.digests import DigestMap, rectangles
from pdkv.core.events import Check, Checked
from pdkv.errors import FailureCode
from pdkv.schema import Manifest, TransferId, VerifyPages

_LOG = logging.getLogger("pdkv.agent")


class PageCheck(msgspec.Struct, frozen=True, eq=False):
    """A comparison whose own digests are being computed; made by ``PageChecker`` alone."""

    wanted: WantedDigests
    theirs: tuple[bytes, ...]
    link: PeerLink


class PageChecker:
    """Owned by the agent thread. ``verify``: what is compared of every transfer."""

    def __init__(
        self, verify: VerifyPages, digests: DigestGroup[PageCheck], manifests: Sequence[Manifest], meter: AgentMeter
    ) -> None:
        """``manifests``: of all ranks of this worker, in order."""
        assert verify is not VerifyPages.OFF, "who compares nothing needs no checker"
        self.verify = verify
        self._digests = digests
        self._manifests = tuple(manifests)
        self._meter = meter
        self._maps: WeakKeyDictionary[PeerLink, DigestMap] = WeakKeyDictionary()

    def check(
        self, check: Check, transfer: TransferId, link: PeerLink, pages: tuple[int, ...], num_tokens: int
    ) -> None:
        """Begin a comparison. ``pages``: all of the transfer's, one a block. Answered through ``take``."""
        mine = pages[check.blocks.start : check.blocks.stop]
        wanted = WantedDigests(transfer, self.verify, check.blocks, mine, num_tokens)
        self._digests.order(PageCheck(wanted, check.by_rank, link), wanted)

    def hear(self, rank: int, report: PagesDigested) -> None:
        """One rank's digests of what it has read."""
        self._digests.hear(rank, report)

    def take(self, is_open: Callable[[TransferId], bool]) -> tuple[TransferId, Checked] | None:
        """The next comparison that has ended; None when there is none. Of a transfer that is not open any more
        nothing is compared: its pages may have been others' when they were digested."""
        while (answer := self._digests.take()) is not None:
            if is_open(answer[0].wanted.transfer):
                return answer[0].wanted.transfer, self._compared(*answer)
        return None

    def close(self) -> None:
        self._digests.close()

    def _compared(self, check: PageCheck, ours: GatheredDigests) -> Checked:
        wanted, link = check.wanted, check.link
        self._meter.digested(ours.seconds)
        if ours.error:
            told = f"digests of what was read from {link.name} could not be computed: {ours.error}"
            return Checked(wanted.blocks, FailureCode.INTERNAL, told)
        if link not in self._maps:
            self._maps[link] = DigestMap.between(link.manifests, self._manifests)
        num_blocks = -(-wanted.num_tokens // self._manifests[0].block_size)
        parts = rectangles(wanted.verify, wanted.transfer, wanted.blocks, num_blocks)
        try:
            found = self._maps[link].compare(parts, check.theirs, ours.by_rank)
        except ValueError as exc:
            return Checked(wanted.blocks, FailureCode.INTERNAL, f"{link.name}: {exc}")
        self._meter.compared(found.checked, found.mismatched)
        if found.first_wrong is None:
            return Checked(wanted.blocks)
        wrong, key = found.first_wrong, found.first_wrong.key
        num_wrong, num_checked = sum(found.mismatched.values()), sum(found.checked.values())
        told = (
            f"block {wrong.block} of {key.name} of layer {key.layer} head {key.head} is not what prefill worker "
            f"{link.name} wrote ({num_wrong} of {num_checked} digests differ, transfer {wanted.transfer.hex()}, over "
            f"{link.path}); nothing was answered from it. Ask again; if it happens again, look at memory and links of "
            "both hosts, or move pages by another --transport"
        )
        _LOG.error("pages differ from what prefill wrote: %s", told)
        return Checked(wanted.blocks, FailureCode.DIGEST_MISMATCH, told)
