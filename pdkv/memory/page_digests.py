"""Digests of an arena's pages: by the kernel on a GPU, on a stream of its own, by the reference on a CPU."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from pdkv_kernels.page_digest_ref import DigestPages, DigestRegions, page_digest_ref

from pdkv.memory.arena import Arena
from pdkv.schema import DigestPart, Int64Array, Region

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
        self._chosen: dict[bytes, DigestRegions] = {}

    def digest(self, parts: Sequence[DigestPart]) -> bytes:
        """int64 [num_regions, num_pages, 2] of each part, the lowest byte first. One way to the device and one back,
        however many parts there are."""
        if self._operation is None:
            self._operation = self._prepare()
        numbers = np.concatenate([_of_pages(part) for part in parts], axis=1)
        with torch.inference_mode(), torch.cuda.stream(self._stream):  # no stream: nothing happens
            there, begin, found = torch.from_numpy(numbers).to(self._device), 0, []
            for part in parts:
                where = (of_pages[begin : begin + part.pages.size] for of_pages in there)
                digests = self._operation(self._rows, self._regions_of(part.regions), DigestPages(*where))
                found.append(digests.view(-1))
                begin += _padded(part)
            here = torch.cat(found).cpu().numpy()
        return np.ascontiguousarray(here, dtype="<i8").tobytes()

    def _regions_of(self, regions: Int64Array) -> DigestRegions:
        """On the device, made once: the same few choices come again with every transfer."""
        name = regions.tobytes()
        if name not in self._chosen:
            columns = self._facts[torch.from_numpy(regions)].to(self._device).unbind(1)
            self._chosen[name] = DigestRegions(*(column.clone() for column in columns))
        return self._chosen[name]

    def _prepare(self) -> _Operation:
        """In the thread that computes, when it is first asked to."""
        if self._device.type != "cuda":
            return page_digest_ref
        from pdkv_kernels.page_digest import page_digest  # noqa: PLC0415 - Triton, which a CPU does without

        torch.cuda.set_device(self._device)
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        return page_digest


def _padded(part: DigestPart) -> int:
    """Numbers of every part begin at a multiple of 16 bytes: where they do not, Triton compiles another kernel."""
    return part.pages.size + part.pages.size % 2


def _of_pages(part: DigestPart) -> Int64Array:  # [3, padded]
    numbers = np.zeros((3, _padded(part)), dtype=np.int64)
    numbers[:, : part.pages.size] = part.pages, part.blocks, part.num_tokens
    return numbers


def region_number(region: Region) -> int:
    """Of a kind of payload and a kv head; the same on any worker."""
    return zlib.crc32(region.name.encode()) << 16 | region.head_start
