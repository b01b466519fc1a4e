"""What lies where inside one row of the arena: pure numbers, for any model, dtype and tensor-parallel shard."""

from typing import Self

import msgspec

from pdkv.errors import ConfigError
from pdkv.schema import KvLayout, RegionSpec, Shard

ROW_ALIGNMENT = 512
"""Bytes; row pitch is rounded up to it, so every row starts where copy engines and vector loads like it."""


class RowSlot(msgspec.Struct, frozen=True):
    """One region's bytes in a row: one layer, one head."""

    spec: RegionSpec
    head: int
    """Global head; 0 for replicated regions."""
    offset: int
    num_bytes: int


class RowLayout(msgspec.Struct, frozen=True):
    """One row: ``[ replicated regions by layer ][ head 0: layers 0..L-1 ][ head 1: ... ]``, of one rank's heads.

    Heads outermost makes the shard of any other rank count a contiguous piece; inside a head, a layer's regions keep
    the order in which the ``KvLayout`` lists them (k, v, k_scale, v_scale).
    """

    kv: KvLayout
    tp_rank: int
    tp_size: int
    heads: range
    """Global kv heads of this rank, contiguous."""
    slots: tuple[RowSlot, ...]
    """In the order of their offsets, without gaps."""
    num_bytes: int
    pitch: int

    @classmethod
    def of(cls, kv: KvLayout, tp_rank: int = 0, tp_size: int = 1) -> Self:
        heads = heads_of_rank(kv.num_kv_heads, tp_rank, tp_size)
        replicated = sorted((s for s in kv.specs if s.shard is Shard.REPLICATED), key=lambda s: s.layer)
        by_head = sorted((s for s in kv.specs if s.shard is Shard.BY_HEAD), key=lambda s: s.layer)
        slots: list[RowSlot] = []
        offset = 0
        for spec, head in [(s, 0) for s in replicated] + [(s, h) for h in heads for s in by_head]:
            num_bytes = kv.block_size * spec.elements_per_token * spec.itemsize
            slots.append(RowSlot(spec=spec, head=head, offset=offset, num_bytes=num_bytes))
            offset += num_bytes
        return cls(
            kv=kv,
            tp_rank=tp_rank,
            tp_size=tp_size,
            heads=heads,
            slots=tuple(slots),
            num_bytes=offset,
            pitch=-(-offset // ROW_ALIGNMENT) * ROW_ALIGNMENT,
        )


def heads_of_rank(num_kv_heads: int, tp_rank: int, tp_size: int) -> range:
    """Global kv heads of one rank: a contiguous share, or one head that several ranks hold when there are more ranks
    than heads. Raises ``ConfigError`` for sizes that do not divide."""
    if not 0 <= tp_rank < tp_size:
        raise ConfigError(f"tp_rank {tp_rank} is not below tp_size {tp_size}")
    if num_kv_heads % tp_size == 0:
        share = num_kv_heads // tp_size
        return range(tp_rank * share, (tp_rank + 1) * share)
    if tp_size % num_kv_heads == 0:
        head = tp_rank * num_kv_heads // tp_size
        return range(head, head + 1)
    raise ConfigError(f"tp_size {tp_size} and {num_kv_heads} kv heads do not divide one another; choose 1, 2, 4 or 8")
