"""The probe's pattern: what P writes into its first and last page, and how D checks what came over.

Every byte of the pattern depends on P's incarnation, the page, the region, its global layer and head and the offset, so
a wrong base, stride, layout, dtype or an old life of a peer cannot pass.
"""

import hashlib
import struct

import numpy as np
import numpy.typing as npt
import torch

from pdkv.memory.arena import Arena
from pdkv.schema import Incarnation, RegionKey

POISON = 0xA5
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def pattern(incarnation: Incarnation, page: int, key: RegionKey, num_bytes: int) -> npt.NDArray[np.uint8]:
    """The expected bytes of one region of one probe page: splitmix64 over 8-byte words from a BLAKE2b seed."""
    head = struct.pack("<QqqQ", incarnation, key.layer, key.head, page)
    seed = np.frombuffer(hashlib.blake2b(head + key.name.encode(), digest_size=8).digest(), dtype="<u8")[0]
    words = np.arange(1, -(-num_bytes // 8) + 1, dtype=np.uint64) * _GOLDEN + seed
    words = (words ^ (words >> np.uint64(30))) * _MIX_1
    words = (words ^ (words >> np.uint64(27))) * _MIX_2
    mixed: npt.NDArray[np.uint64] = words ^ (words >> np.uint64(31))
    return mixed.view(np.uint8)[:num_bytes]


class ProbePages:
    """The first and the last page of an arena, reserved for proving a path. Used by the agent thread only."""

    def __init__(self, arena: Arena) -> None:
        self._arena = arena
        self._keys = [RegionKey(r.name, r.layer, r.head_start) for r in arena.regions()]

    @property
    def pages(self) -> tuple[int, int]:
        return 0, self._arena.num_pages - 1

    def fill(self, incarnation: Incarnation) -> None:
        """Write this worker's own pattern into both pages, for peers to read."""
        for page in self.pages:
            for key in self._keys:
                target = self._arena.page_bytes(key.name, key.layer, key.head, page)
                target.copy_(torch.from_numpy(pattern(incarnation, page, key, target.numel())))
        self._settle()

    def poison(self) -> None:
        """Overwrite both pages, so that what a peer did not send cannot look right."""
        for page in self.pages:
            for key in self._keys:
                self._arena.page_bytes(key.name, key.layer, key.head, page).fill_(POISON)
        self._settle()

    def _settle(self) -> None:
        """Peers and transports do not wait for our streams: what was written must be in memory when we return."""
        device = self._arena.rows().device
        if device.type != "cpu":
            torch.accelerator.current_stream(device).synchronize()

    def mismatches(self, peer: Incarnation, source_page: int, page: int) -> list[RegionKey]:
        """Regions of local ``page`` that differ from what ``peer`` wrote into ``source_page``, byte for byte."""
        wrong = []
        for key in self._keys:
            found = self._arena.page_bytes(key.name, key.layer, key.head, page).cpu().numpy()
            if not np.array_equal(found, pattern(peer, source_page, key, found.size)):
                wrong.append(key)
        return wrong
