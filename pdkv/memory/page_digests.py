"""Digests of an arena's pages: by the kernel on a GPU, on a stream of its own, by the reference on a CPU."""

import zlib
from collections.abc import Callable

import numpy as np
import torch
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions, page_digest_ref

from pdkv.memory.arena import Arena
from pdkv.schema import Int64Array, Region

_Operation = Callable[[torch.Tensor, DigestRegions, DigestPages], torch.Tensor]


class ArenaDigests:
    """See ``pdkv.agent.rank_digests.PageDigests``. Used by one thread; reads pages that nobody writes to meanwhile.

    Every kernel that wrote them has ended, and every read that brought them, before this is asked.
    """

    def __init__(self, arena: Arena) -> None:
        self._rows = arena.rows()
        self._device = self._rows.device
        self._operation: _Operation | None = None
        self._stream: torch.cuda.Stream | None = None
        regions = list(arena.regions())
        block_size = arena.layout.kv.block_size
        # One row a region: offset, bytes of a token, number, layer.
        facts = [(r.offset, r.bytes_per_page // block_size, region_number(r), r.layer) for r in regions]
        self._facts = torch.tensor(facts, dtype=torch.int64)

    def digest(self, regions: Int64Array, pages: Int64Array, blocks: Int64Array, num_tokens: Int64Array) -> bytes:
        """int64 [num_regions, num_pages, 2], the lowest byte first."""
        if self._operation is None:
            self._operation = self._prepare()
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # no stream: nothing happens
            facts = self._facts[torch.from_numpy(regions)].to(self._device).unbind(1)
            where = (torch.from_numpy(numbers).to(self._device) for numbers in (pages, blocks, num_tokens))
            of_regions = DigestRegions(*(column.contiguous() for column in facts))
            digests = self._operation(self._rows, of_regions, DigestPages(*where)).cpu().numpy()
        return np.ascontiguousarray(digests, dtype="<i8").tobytes()

    def _prepare(self) -> _Operation:
        """In the thread that computes, when it is first asked to."""
        if self._device.type != "cuda":
            return page_digest_ref
        from pdkv_kernels.page_digest import page_digest  # noqa: PLC0415 - Triton, which a CPU does without

        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return page_digest


def region_number(region: Region) -> int:
    """Of a kind of payload and a kv head; the same on any worker."""
    return zlib.crc32(region.name.encode()) << 16 | region.head_start
