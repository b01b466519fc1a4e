"""One rank's digests of its pages: P's of what it wrote, D's of what it has read, by the same code on both.

They are computed in a thread of their own, so that neither the agent nor the engine's steps wait for them.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Protocol

import msgspec
import numpy as np

from pdkv.core.digests import DigestKeys, rectangles
from pdkv.core.residency import BlockRange
from pdkv.schema import DigestPart, Manifest, TransferId, VerifyPages

_LOG = logging.getLogger("pdkv.agent")


class DigestPages(msgspec.Struct, frozen=True, tag="digest"):
    """From rank 0's agent to every rank: digest ``pages[i]``, which holds block ``start + i``. Answered by
    ``PagesDigested``."""

    job: int
    """Chosen by rank 0, never used again."""
    transfer: bytes
    verify: VerifyPages
    start: int
    pages: tuple[int, ...]
    num_tokens: int
    """Of the whole prompt: what lies behind it in its last page is not looked at."""

    @property
    def blocks(self) -> BlockRange:
        return BlockRange(self.start, self.start + len(self.pages))


class PagesDigested(msgspec.Struct, frozen=True, tag="digested"):
    """A rank's digests, in the order of ``pdkv.core.digests``."""

    job: int
    digests: bytes
    seconds: float
    """What they took."""
    error: str = ""


class PageDigests(Protocol):
    """Digests of a rank's pages. Implemented by ``pdkv.memory.page_digests.ArenaDigests``."""

    def digest(self, parts: Sequence[DigestPart]) -> bytes:
        """16 bytes for each region of each page, part after part, regions outermost in each. Called from one thread;
        returns when all is computed."""
        ...


class RankDigests:
    """Obeys orders of rank 0's agent, one after another. ``obey`` is called by the rank's agent thread, ``tell`` from
    the thread that computes; it must only queue. Nothing runs, and nothing is set up, before the first order."""

    def __init__(self, manifest: Manifest, pages: PageDigests, tell: Callable[[PagesDigested], None]) -> None:
        self._keys = DigestKeys(manifest)
        self._block_size = manifest.block_size
        self._pages = pages
        self._tell = tell
        self._orders: queue.SimpleQueue[DigestPages | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def obey(self, order: DigestPages) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="pdkv-digests", daemon=True)
            self._thread.start()
        self._orders.put(order)

    def close(self) -> None:
        """End the thread when it has done what it is at; what waits is dropped. Idempotent."""
        self._closing.set()
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join()
            self._thread = None

    def _run(self) -> None:
        while (order := self._orders.get()) is not None and not self._closing.is_set():
            began = time.perf_counter()
            digests, error = b"", ""
            try:
                digests = self._digest(order)
            except Exception as exc:  # noqa: BLE001 - of this thread the outermost frame: the transfer must fail of it
                _LOG.exception("digests of pages failed")
                error = f"{type(exc).__name__}: {exc}"
            self._tell(PagesDigested(order.job, digests, time.perf_counter() - began, error))

    def _digest(self, order: DigestPages) -> bytes:
        pages = np.array(order.pages, dtype=np.int64)
        parts = []
        num_blocks = -(-order.num_tokens // self._block_size)
        for part in rectangles(order.verify, TransferId(order.transfer), order.blocks, num_blocks):
            regions, blocks = self._keys.of(part.residue), np.array(part.blocks, dtype=np.int64)
            if regions.size:
                num_tokens = np.minimum(self._block_size, order.num_tokens - blocks * self._block_size)
                parts.append(DigestPart(regions, pages[blocks - order.start], blocks, num_tokens))
        return self._pages.digest(parts) if parts else b""
