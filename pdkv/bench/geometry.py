"""The spans of a prompt of the released MiniMax-M3, laid out as arena rows or as one tensor per layer."""

from collections.abc import Iterator
from typing import Self

import msgspec
import numpy as np
import numpy.typing as npt

from pdkv.core.plan import TransferPlan
from pdkv.errors import ConfigError
from pdkv.m3.config import M3Config, kv_layout
from pdkv.memory.row import RowLayout
from pdkv.schema import PROTOCOL_VERSION, Int64Array, Manifest, Region, Shard

LAYOUTS = ("arena", "per-layer")

_LAYERS, _DENSE = 60, 3

_RELEASED = M3Config(
    hidden_size=6144,
    num_layers=_LAYERS,
    num_heads=64,
    num_kv_heads=4,
    head_dim=128,
    vocab_size=200_064,
    max_position_embeddings=1 << 20,
    rms_norm_eps=1e-6,
    rope_theta=5e6,
    rotary_dim=64,
    dense_intermediate_size=12_288,
    expert_intermediate_size=3_072,
    shared_intermediate_size=3_072,
    num_experts=128,
    experts_per_token=4,
    routed_scaling_factor=2.0,
    moe_layers=tuple(layer >= _DENSE for layer in range(_LAYERS)),
    sparse_layers=tuple(layer >= _DENSE for layer in range(_LAYERS)),
    num_index_heads=4,
    index_dim=128,
    topk_blocks=16,
    dtype="bfloat16",
)


class Workload(msgspec.Struct, frozen=True):
    """Whose state moves: of how many tokens, for one rank of how many, stored in what."""

    tokens: int
    tp: int = 4
    kv_dtype: str = "fp8"
    index_dtype: str = "fp8"
    seed: int = 0

    @property
    def num_pages(self) -> int:
        return -(-self.tokens // _RELEASED.block_size)

    def row(self) -> RowLayout:
        """Raises ``ConfigError`` or ``ModelError`` for a rank count or dtype that there is not."""
        if self.tokens < 1:
            raise ConfigError(f"a prompt of {self.tokens} tokens moves nothing")
        return RowLayout.of(kv_layout(_RELEASED, self.kv_dtype, self.index_dtype), 0, self.tp)


class Spans(msgspec.Struct, frozen=True):
    """What moves from one memory to another. Offsets, both in bytes from their memory's start."""

    remote: Int64Array
    local: Int64Array
    length: Int64Array

    @classmethod
    def of(cls, workload: Workload, layout: str) -> Self:
        """Pages in random order, and never two neighbours to two neighbours: no run of pages is one span."""
        manifest = manifest_of(workload.row(), workload.num_pages, layout)
        theirs = np.random.default_rng(workload.seed).permutation(workload.num_pages)
        ours = workload.num_pages - 1 - theirs  # in the other direction
        plan = TransferPlan.between([manifest], manifest)
        batch = plan.reads(theirs.tolist(), ours.tolist(), (0,))[0]
        return cls(batch.remote, batch.local, batch.length)

    @property
    def num_bytes(self) -> int:
        return int(self.length.sum())

    def table(self) -> npt.NDArray[np.int64]:  # [3, spans]
        return np.stack([self.remote, self.local, self.length])


def memory_bytes(workload: Workload) -> int:
    """What one side needs, in either layout."""
    return workload.row().pitch * workload.num_pages


def manifest_of(row: RowLayout, num_pages: int, layout: str) -> Manifest:
    if layout not in LAYOUTS:
        raise ConfigError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    in_rows = layout == "arena"
    return Manifest(
        protocol=PROTOCOL_VERSION,
        model_fingerprint="bench",
        block_size=row.kv.block_size,
        num_layers=row.kv.num_layers,
        num_kv_heads=row.kv.num_kv_heads,
        kv_dtype=row.kv.kv_dtype,
        index_dtype=row.kv.index_dtype,
        scale_convention=row.kv.scale_convention,
        index_schedule=row.kv.index_schedule,
        tp_rank=row.tp_rank,
        tp_size=row.tp_size,
        num_pages=num_pages,
        row_padding=row.pitch - row.num_bytes if in_rows else 0,
        regions=tuple(_arena_regions(row) if in_rows else _tensor_regions(row, num_pages)),
    )


def _arena_regions(row: RowLayout) -> Iterator[Region]:
    for slot in row.slots:
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
            page_stride=row.pitch,
        )


def _tensor_regions(row: RowLayout, num_pages: int) -> Iterator[Region]:
    """One tensor [pages, heads, tokens, ...] for each name and layer, one after another."""
    offset = 0
    for spec in row.kv.specs:
        heads = len(row.heads) if spec.shard is Shard.BY_HEAD else 1
        num_bytes = heads * row.kv.block_size * spec.elements_per_token * spec.itemsize
        yield Region(
            name=spec.name,
            layer=spec.layer,
            head_start=row.heads.start if spec.shard is Shard.BY_HEAD else 0,
            num_heads=heads,
            dtype=spec.dtype,
            bytes_per_page=num_bytes,
            shard=spec.shard,
            memory=0,
            offset=offset,
            page_stride=num_bytes,
        )
        offset += num_bytes * num_pages
