"""KV layouts for tests: the released M3's and any smaller one, in every cache dtype the arena knows."""

from pdkv.schema import KvLayout, RegionSpec, Shard

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
