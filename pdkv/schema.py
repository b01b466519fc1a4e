"""The nouns every layer shares: ids, regions, layouts, manifests and batches of spans. Values only, no behaviour."""

from enum import Enum, StrEnum
from typing import NewType

import msgspec
import numpy as np
import numpy.typing as npt

PROTOCOL_VERSION = 4

TransferId = NewType("TransferId", bytes)
"""128 random bits chosen by the router; one try of one request."""

Incarnation = NewType("Incarnation", int)
"""Random 64-bit id of one life of a worker process; its highest byte is not zero (zmq identities begin so)."""

Int64Array = npt.NDArray[np.int64]


class Shard(Enum):
    """How a region is spread over the tensor-parallel ranks of a worker."""

    BY_HEAD = "by_head"
    REPLICATED = "replicated"


class VerifyPages(StrEnum):
    """Of which pages that it has read D checks digests."""

    OFF = "off"
    SAMPLE = "sample"
    FULL = "full"


class RegionKey(msgspec.Struct, frozen=True, order=True):
    """What a region *is*, independent of where it lies: the planner and manifests match regions by this key."""

    name: str
    layer: int
    """Global layer id, never a position in some list."""
    head: int
    """Global kv head for regions sharded by head, 0 for replicated ones."""


class LayerRange(msgspec.Struct, frozen=True):
    """Layers from ``start`` on, global ids, up to but without ``stop``; None = all the rest."""

    start: int = 0
    stop: int | None = None

    def __contains__(self, layer: int) -> bool:
        return self.start <= layer and (self.stop is None or layer < self.stop)


ALL_LAYERS = LayerRange()


class Region(msgspec.Struct, frozen=True):
    """One kind of payload inside every page of one rank: page p of it starts at ``offset + p * page_stride``.

    ``head_start`` and ``num_heads`` are global; heads lie one after another, each ``bytes_per_page / num_heads``
    bytes long. A replicated region has ``head_start`` 0 and ``num_heads`` 1.
    """

    name: str
    layer: int
    head_start: int
    num_heads: int
    dtype: str
    bytes_per_page: int
    shard: Shard
    memory: int
    """Index of the registered memory that holds it."""
    offset: int
    """Bytes from the start of that memory to page 0 of this region."""
    page_stride: int
    """Bytes from one page to the next."""


class RegionSpec(msgspec.Struct, frozen=True):
    """One kind of payload that the model leaves behind for every token of one layer."""

    name: str
    layer: int
    shard: Shard
    num_heads: int
    """Heads over all ranks; 1 for replicated regions."""
    elements_per_token: int
    """Elements of one token of one head: head_dim, or 1 for scales."""
    dtype: str
    itemsize: int


class KvLayout(msgspec.Struct, frozen=True):
    """Everything a token leaves behind, over all layers and ranks. Made only by ``pdkv.m3.config.kv_layout``."""

    block_size: int
    num_layers: int
    num_kv_heads: int
    kv_dtype: str
    index_dtype: str
    scale_convention: str
    """How stored K/V becomes numbers: "none" for floats, "unit-e5m2", "per-token-head-f32-absmax/448-e4m3fn"."""
    index_schedule: str
    """Which sparse layers select blocks and write index keys: "all", or their ids in words."""
    specs: tuple[RegionSpec, ...]


class Manifest(msgspec.Struct, frozen=True):
    """What one rank of a worker holds, complete: compared at the handshake, never inferred, never truncated."""

    protocol: int
    model_fingerprint: str
    block_size: int
    num_layers: int
    num_kv_heads: int
    kv_dtype: str
    index_dtype: str
    scale_convention: str
    index_schedule: str
    tp_rank: int
    tp_size: int
    num_pages: int
    row_padding: int
    """Bytes after the last region of a page, up to the page stride, that belong to nobody and may be read and written
    along; 0 when regions do not share a row."""
    regions: tuple[Region, ...]


class MemoryDescriptor(msgspec.Struct, frozen=True):
    """What a peer needs to read one registered memory. ``key`` is opaque to all but the transport that made it."""

    address: int
    length: int
    key: bytes


class TransportAddress(msgspec.Struct, frozen=True):
    """Where one rank's transport is reached, and what may be read there."""

    transport: str
    """Implementation: "auto", "nixl", "nvlink", "shm", "sockets", "ucx", "inproc"."""
    address: bytes
    memories: tuple[MemoryDescriptor, ...]


class LocalMemory(msgspec.Struct, frozen=True):
    """Bytes of this process, owned by whoever made them; must outlive every transport they are registered with."""

    address: int
    length: int
    device: str = "cpu"
    memfd: int = -1
    """Descriptor of the memfd that is mapped from its start at ``address``, the maker's to close; -1 = none."""


class ReadBatch(msgspec.Struct, frozen=True):
    """Spans to read in one go. Four arrays of equal length, one entry a span; no Python object per span.

    ``memory`` indexes the peer's registered memories, ``remote`` is an offset inside it, ``local`` an absolute
    address in this process, ``length`` is in bytes and positive.
    """

    memory: Int64Array
    remote: Int64Array
    local: Int64Array
    length: Int64Array

    @property
    def num_spans(self) -> int:
        return int(self.length.size)

    @property
    def num_bytes(self) -> int:
        return int(self.length.sum())


class DigestPart(msgspec.Struct, frozen=True):
    """Pages to digest, every one of ``pages`` in every one of ``regions``."""

    regions: Int64Array
    """Places in the rank's manifest."""
    pages: Int64Array
    blocks: Int64Array
    """What each page holds."""
    num_tokens: Int64Array
    """And how many valid tokens of it."""
