"""A rank's manifest, made from its arena and checked against what the model needs."""

from pdkv.errors import ConfigError
from pdkv.memory.arena import Arena
from pdkv.schema import PROTOCOL_VERSION, KvLayout, Manifest


def build_manifest(arena: Arena, needed: KvLayout, model_fingerprint: str) -> Manifest:
    """Every region of ``arena`` by name and global layer id.

    Raises ``ConfigError`` naming the first regions that the model needs and the arena lacks: a worker that would forget
    a kind of state does not start.
    """
    layout = arena.layout
    held = {(region.name, region.layer) for region in arena.regions()}
    missing = sorted((s.layer, s.name) for s in needed.specs if (s.name, s.layer) not in held)
    if missing:
        listed = ", ".join(f"{name} of layer {layer}" for layer, name in missing[:8])
        raise ConfigError(f"the arena lacks {len(missing)} regions that the model needs: {listed}")
    return Manifest(
        protocol=PROTOCOL_VERSION,
        model_fingerprint=model_fingerprint,
        block_size=layout.kv.block_size,
        num_layers=layout.kv.num_layers,
        num_kv_heads=layout.kv.num_kv_heads,
        kv_dtype=layout.kv.kv_dtype,
        index_dtype=layout.kv.index_dtype,
        scale_convention=layout.kv.scale_convention,
        index_schedule=layout.kv.index_schedule,
        tp_rank=layout.tp_rank,
        tp_size=layout.tp_size,
        num_pages=arena.num_pages,
        row_padding=layout.pitch - layout.num_bytes,
        regions=tuple(arena.regions()),
    )
