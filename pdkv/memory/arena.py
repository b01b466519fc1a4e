"""The arena: the memory that holds all pages of a rank, one row a page, seen through strided views."""

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterator

import torch

from pdkv.errors import CapacityError, ConfigError
from pdkv.memory.device_memory import allocate_on
from pdkv.memory.row import RowLayout, RowSlot
from pdkv.schema import LocalMemory, Region, Shard

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e4m3fnuz": torch.float8_e4m3fnuz,
    "float8_e5m2": torch.float8_e5m2,
}


def map_shared(num_bytes: int) -> tuple[torch.Tensor, int]:  # [num_bytes] uint8
    """Zeroed host memory, a memfd mapped shared, and its descriptor, so that a peer on the host can map it too.

    The file keeps its size for ever: whoever has mapped it can read to its end. Mapping and descriptor live as long as
    the returned tensor or a view of it. Raises ``CapacityError`` when the kernel refuses.
    """
    fd = os.memfd_create("pdkv-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
        mapping = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
    except OSError as exc:
        os.close(fd)
        raise CapacityError(f"cannot map an arena of {num_bytes:,} bytes: {exc}; use fewer pages") from exc
    weakref.finalize(mapping, os.close, fd)
    return torch.frombuffer(mapping, dtype=torch.uint8), fd


class Arena:
    """All pages of one rank. ``storage`` belongs to the arena from here on; page p is its row p.

    The engine thread writes rows; transports read and write them by address, fenced by leases.
    """

    def __init__(self, layout: RowLayout, storage: torch.Tensor, memfd: int = -1) -> None:
        """``storage``: [num_pages * pitch] uint8. ``memfd``: descriptor of the memfd that it maps from its start."""
        if storage.dtype != torch.uint8 or storage.dim() != 1 or not storage.is_contiguous():
            raise ConfigError("arena storage must be one contiguous vector of uint8")
        if storage.numel() == 0 or storage.numel() % layout.pitch:
            raise ConfigError(
                f"arena storage of {storage.numel()} bytes is not a whole number of {layout.pitch}-byte rows"
            )
        if storage.data_ptr() % 8:
            raise ConfigError("arena storage must be aligned to 8 bytes")
        self.layout = layout
        self.num_pages = storage.numel() // layout.pitch
        self._storage = storage
        self._memfd = memfd
        self._slots = {(s.spec.name, s.spec.layer, s.head): s for s in layout.slots}
        self._views: dict[tuple[str, int], torch.Tensor] = {}
        for slot in layout.slots:
            if (slot.spec.name, slot.spec.layer) not in self._views:
                self._views[slot.spec.name, slot.spec.layer] = self._make_view(slot)

    @classmethod
    def allocate(cls, layout: RowLayout, num_pages: int, device: str | torch.device = "cpu") -> "Arena":
        """An arena in zeroed memory that peers can map: shared memory of the host, or an allocation of a GPU."""
        if num_pages < 1:
            raise ConfigError(f"an arena needs at least one page, not {num_pages}")
        place = torch.device(device)
        if place.type == "cpu":
            return cls(layout, *map_shared(num_pages * layout.pitch))
        return cls(layout, allocate_on(place, num_pages * layout.pitch))

    @property
    def memory(self) -> LocalMemory:
        """The whole arena, for a transport to register."""
        return LocalMemory(
            address=self._storage.data_ptr(),
            length=self._storage.numel(),
            device=str(self._storage.device),
            memfd=self._memfd,
        )

    def view(self, name: str, layer: int) -> torch.Tensor:
        """One region of one layer, over all pages, in place.

        k, v: [num_pages, heads, block_size, head_dim]; k_scale, v_scale: [num_pages, heads, block_size];
        index_k: [num_pages, block_size, index_dim]. Heads are this rank's. Raises ``KeyError`` for a region that the
        layout does not have: a layer without index keys is no layer with empty ones.
        """
        return self._views[name, layer]

    def has(self, name: str, layer: int) -> bool:
        """Whether ``view`` has this region."""
        return (name, layer) in self._views

    def rows(self) -> torch.Tensor:  # [num_pages, pitch] uint8
        """Every byte of every page, padding included, in place."""
        return self._storage.view(self.num_pages, self.layout.pitch)

    def page_bytes(self, name: str, layer: int, head: int, page: int) -> torch.Tensor:  # [bytes] uint8
        """The bytes of one page of one region of one (global) head, in place."""
        slot = self._slots[name, layer, head]
        local = head - self.layout.heads.start if slot.spec.shard is Shard.BY_HEAD else 0
        view = self._views[name, layer]
        piece = view[page, local] if slot.spec.shard is Shard.BY_HEAD else view[page]
        return piece.reshape(-1).view(torch.uint8)

    def regions(self) -> Iterator[Region]:
        """Every region of every layer and head by its global ids; the arena is memory 0."""
        for slot in self.layout.slots:
            yield Region(
                name=slot.spec.name,
                layer=slot.spec.layer,
                head_start=slot.head,
                num_heads=1,
                dtype=slot.spec.dtype,
                bytes_per_page=slot.num_bytes,
                shard=slot.spec.shard,
                memory=0,
                offset=slot.offset,
                page_stride=self.layout.pitch,
            )

    def _make_view(self, first: RowSlot) -> torch.Tensor:
        spec, block = first.spec, self.layout.kv.block_size
        typed = self._storage.view(DTYPES[spec.dtype])
        shape, strides = [self.num_pages], [self.layout.pitch // spec.itemsize]
        if spec.shard is Shard.BY_HEAD:
            heads = self.layout.heads
            second = self._slots[spec.name, spec.layer, heads[1]].offset if len(heads) > 1 else first.offset
            shape.append(len(heads))
            strides.append((second - first.offset) // spec.itemsize)
        shape.append(block)
        strides.append(spec.elements_per_token)
        if spec.elements_per_token > 1:
            shape.append(spec.elements_per_token)
            strides.append(1)
        return typed.as_strided(shape, strides, first.offset // spec.itemsize)
