"""KV layouts for tests: the released M3's and any smaller one, in every cache dtype the arena knows."""

from pdkv.memory.row import RowLayout
from pdkv.schema import PROTOCOL_VERSION, KvLayout, Manifest, Region, RegionSpec, Shard

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}


def make_layout(
    num_layers: int = 60,
    num_dense: int = 3,
    num_kv_heads: int = 4,
    kv_dtype: str = "bfloat16",
    index_dtype: str = "bfloat16",
    block_size: int = 128,
    head_dim: int = 128,
) -> KvLayout:
    specs = []
    for layer in range(num_layers):
        names = [("k", head_dim, kv_dtype), ("v", head_dim, kv_dtype)]
        if kv_dtype == "float8_e4m3fn":
            names += [("k_scale", 1, "float32"), ("v_scale", 1, "float32")]
        specs += [RegionSpec(n, layer, Shard.BY_HEAD, num_kv_heads, e, d, ITEMSIZE[d]) for n, e, d in names]
        if layer >= num_dense:
            specs.append(
                RegionSpec("index_k", layer, Shard.REPLICATED, 1, head_dim, index_dtype, ITEMSIZE[index_dtype])
            )
    return KvLayout(
        block_size=block_size,
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        scale_convention="per-token-head-f32" if kv_dtype == "float8_e4m3fn" else "none",
        index_schedule="all",
        specs=tuple(specs),
    )


def make_manifest(kv: KvLayout, rank: int = 0, size: int = 1, num_pages: int = 16, *, rows: bool = True) -> Manifest:
    """The manifest of one rank: an arena of rows, or one tensor a layer and kind as other engines have."""
    layout = RowLayout.of(kv, rank, size)
    regions = _row_regions(layout) if rows else _tensor_regions(layout, num_pages)
    return Manifest(
        protocol=PROTOCOL_VERSION,
        model_fingerprint="model",
        block_size=kv.block_size,
        num_layers=kv.num_layers,
        num_kv_heads=kv.num_kv_heads,
        kv_dtype=kv.kv_dtype,
        index_dtype=kv.index_dtype,
        scale_convention=kv.scale_convention,
        index_schedule=kv.index_schedule,
        tp_rank=rank,
        tp_size=size,
        num_pages=num_pages,
        row_padding=layout.pitch - layout.num_bytes if rows else 0,
        regions=regions,
    )


def _row_regions(layout: RowLayout) -> tuple[Region, ...]:
    return tuple(
        Region(s.spec.name, s.spec.layer, s.head, 1, s.spec.dtype, s.num_bytes, s.spec.shard, 0, s.offset, layout.pitch)
        for s in layout.slots
    )


def _tensor_regions(layout: RowLayout, num_pages: int) -> tuple[Region, ...]:
    """``[pages, heads, block, dim]`` a layer and kind, one after another in one memory."""
    regions, base = [], 0
    for spec in layout.kv.specs:
        heads = layout.heads if spec.shard is Shard.BY_HEAD else range(1)
        size = len(heads) * layout.kv.block_size * spec.elements_per_token * spec.itemsize
        regions.append(
            Region(spec.name, spec.layer, heads.start, len(heads), spec.dtype, size, spec.shard, 0, base, size)
        )
        base += size * num_pages
    return tuple(regions)


def memory_length(manifest: Manifest) -> int:
    return max(r.offset + (manifest.num_pages - 1) * r.page_stride + r.bytes_per_page for r in manifest.regions)
