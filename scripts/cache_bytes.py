"""Prints what a token of the released MiniMax-M3 leaves behind, by cache dtype and index schedule, as in docs/cache.md.

python scripts/cache_bytes.py
"""

from collections.abc import Iterator

import msgspec

from pdkv.m3.config import M3Config, kv_layout
from pdkv.memory.row import RowLayout

STORED = (
    ("bfloat16", "bfloat16"),
    ("fp8", "bfloat16"),
    ("fp8", "fp8"),
    ("fp8_unit", "fp8"),
)
FREQUENCIES = (1, 2, 4)
RANKS = (1, 4)


def released() -> M3Config:
    """The numbers of the released config that state hangs on, and plausible others."""
    sparse = (False,) * 3 + (True,) * 57
    return M3Config(
        hidden_size=6144,
        num_layers=60,
        num_heads=64,
        num_kv_heads=4,
        head_dim=128,
        vocab_size=200064,
        max_position_embeddings=1_048_576,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rotary_dim=64,
        dense_intermediate_size=12288,
        expert_intermediate_size=3072,
        shared_intermediate_size=3072,
        num_experts=128,
        experts_per_token=4,
        routed_scaling_factor=2.0,
        moe_layers=sparse,
        sparse_layers=sparse,
        num_index_heads=4,
        index_dim=128,
        topk_blocks=16,
        dtype="bfloat16",
    )


def with_frequency(config: M3Config, freq: int) -> M3Config:
    sparse = [layer for layer, is_sparse in enumerate(config.sparse_layers) if is_sparse]
    return msgspec.structs.replace(config, reusing_layers=tuple(x for o, x in enumerate(sparse) if o % freq))


def table() -> Iterator[str]:
    """Lines of a Markdown table."""
    ranks = " | ".join(f"TP{n}: bytes a token and rank" for n in RANKS)
    yield f"| K/V | index | freq | index regions | {ranks} | saved of TP{RANKS[-1]} |"
    yield "|---|---|---|---|" + "---|" * (len(RANKS) + 1)
    for kv_dtype, index_dtype in STORED:
        whole = 0
        for freq in FREQUENCIES:
            layout = kv_layout(with_frequency(released(), freq), kv_dtype, index_dtype)
            rows = [RowLayout.of(layout, 0, size).num_bytes // layout.block_size for size in RANKS]
            whole = whole or rows[-1]
            regions = sum(spec.name == "index_k" for spec in layout.specs)
            numbers = " | ".join(f"{n:,}" for n in rows)
            saved = f"{whole - rows[-1]:,} ({1 - rows[-1] / whole:.0%})"
            yield f"| {kv_dtype} | {index_dtype} | {freq} | {regions} | {numbers} | {saved} |"


if __name__ == "__main__":
    print("\n".join(table()))
