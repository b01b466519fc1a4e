"""What pdkv knows of a MiniMax-M3 text model: its config, the state that a token of it leaves behind, its identity."""

import hashlib
from pathlib import Path

import msgspec

from pdkv.errors import ModelError
from pdkv.m3.checkpoint import digest_weights
from pdkv.m3.config_file import load_config
from pdkv.m3.config_support import BLOCK_SIZE
from pdkv.m3.model_config import M3Config
from pdkv.schema import KvLayout, RegionSpec, Shard

__all__ = ["BLOCK_SIZE", "ITEMSIZE", "M3Config", "kv_layout", "load_config", "model_fingerprint"]

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
"""Bytes of one element of every dtype that state may be stored in."""


def kv_layout(config: M3Config, kv_dtype: str, index_dtype: str) -> KvLayout:
    """All state that one token leaves behind; the one place in pdkv that knows what M3 needs.

    Dtypes are named as torch names them: float32, bfloat16, float8_e4m3fn. Specs come in the order of an arena row:
    index keys of the sparse layers, then for each layer k, v and, with fp8 K/V, k_scale, v_scale (one float32 for
    each token and kv head, by which a stored element is multiplied when read).
    """
    for what, dtype in (("K/V", kv_dtype), ("index", index_dtype)):
        if dtype not in ITEMSIZE:
            raise ModelError(f"{what} dtype {dtype!r} is not one of {', '.join(ITEMSIZE)}")
    scaled = kv_dtype == "float8_e4m3fn"
    specs = [
        _spec("index_k", layer, config.index_dim, index_dtype)
        for layer, sparse in enumerate(config.sparse_layers)
        if sparse
    ]
    for layer in range(config.num_layers):
        specs += [_spec(name, layer, config.head_dim, kv_dtype, config.num_kv_heads) for name in ("k", "v")]
        if scaled:
            specs += [_spec(name, layer, 1, "float32", config.num_kv_heads) for name in ("k_scale", "v_scale")]
    return KvLayout(
        block_size=config.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        kv_dtype=kv_dtype,
        index_dtype=index_dtype,
        scale_convention="per-token-head-f32" if scaled else "none",
        index_schedule="all",
        specs=tuple(specs),
    )


def model_fingerprint(model_dir: Path, config: M3Config) -> str:
    """Hex digest that two workers must share to be paired: of the config as understood, and of the weight *files*.

    The config counts by meaning, so it does not matter in which form it is written. The weights count by their files
    (``digest_weights``): the same model in another form, or cut into other shards, has another fingerprint, and two
    workers that loaded different files are not paired. That errs on the safe side, and costs no reading of all bytes.
    """
    digest = hashlib.sha256(msgspec.json.encode(config, order="sorted"))
    digest_weights(model_dir, digest)
    return digest.hexdigest()


def _spec(name: str, layer: int, elements_per_token: int, dtype: str, num_heads: int = 0) -> RegionSpec:
    """Sharded by head, or replicated when no head count is given."""
    return RegionSpec(
        name=name,
        layer=layer,
        shard=Shard.BY_HEAD if num_heads else Shard.REPLICATED,
        num_heads=num_heads or 1,
        elements_per_token=elements_per_token,
        dtype=dtype,
        itemsize=ITEMSIZE[dtype],
    )
