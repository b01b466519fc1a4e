"""What pdkv knows of a MiniMax-M3 text model: its config, the state that a token of it leaves behind, its identity."""

import hashlib
from pathlib import Path

import msgspec

from pdkv.errors import ModelError
from pdkv.m3.checkpoint import digest_weights
from pdkv.m3.config_file import load_config
from pdkv.m3.config_support import BLOCK_SIZE
from pdkv.m3.index_schedule import IndexScheduleOverride, schedule_in_words
from pdkv.m3.model_config import M3Config
from pdkv.schema import KvLayout, RegionSpec, Shard

__all__ = ["BLOCK_SIZE", "IndexScheduleOverride", "M3Config", "kv_layout", "load_config", "model_fingerprint"]


class CacheDtype(msgspec.Struct, frozen=True):
    """How one kind of state is stored."""

    dtype: str
    """As torch names it."""
    itemsize: int
    scale_convention: str = "none"
    scaled: bool = False
    """Each token and head has a float32 of its own, by which a stored element is multiplied when read."""


_FLOATS = {
    "float32": CacheDtype("float32", 4),
    "bfloat16": CacheDtype("bfloat16", 2),
    "float16": CacheDtype("float16", 2),
}
_FP8 = CacheDtype("float8_e4m3fn", 1, "per-token-head-f32-absmax/448-e4m3fn", scaled=True)
_FP8_UNIT = CacheDtype("float8_e4m3fn", 1, "unit-e4m3fn")
_FP8_E5M2 = CacheDtype("float8_e5m2", 1, "unit-e5m2")

KV_DTYPES = {
    **_FLOATS,
    "fp8": _FP8,
    "fp8_unit": _FP8_UNIT,
    "fp8_e5m2": _FP8_E5M2,
    "float8_e4m3fn": _FP8,
    "float8_e5m2": _FP8_E5M2,
}
"""What K/V may be stored in: our names, and torch's for the same. Unit scale: stored as it is, saturated."""

INDEX_DTYPES = {**_FLOATS, "fp8": _FP8_UNIT, "float8_e4m3fn": _FP8_UNIT}
"""What index keys may be stored in. fp8 has no scale: their norm keeps them small, a common one changes no order."""


def kv_layout(config: M3Config, kv_dtype: str = "auto", index_dtype: str = "auto") -> KvLayout:
    """All state that one token leaves behind; the one place in pdkv that knows what M3 needs.

    Names of ``KV_DTYPES`` and ``INDEX_DTYPES``; auto is the model's own dtype. Specs come in the order of an arena row:
    index keys of the layers that select blocks, then for each layer k, v and, with dynamic scales, k_scale, v_scale
    (one float32 for each token and kv head). Layers that reuse a selection have no index keys.
    """
    kv = _cache_dtype("K/V", KV_DTYPES, config.dtype if kv_dtype == "auto" else kv_dtype)
    index = _cache_dtype("index", INDEX_DTYPES, config.dtype if index_dtype == "auto" else index_dtype)
    specs = [
        _spec("index_k", layer, config.index_dim, index)
        for layer, selecting in enumerate(config.selecting_layers)
        if selecting
    ]
    for layer in range(config.num_layers):
        specs += [_spec(name, layer, config.head_dim, kv, config.num_kv_heads) for name in ("k", "v")]
        if kv.scaled:
            scale = _FLOATS["float32"]
            specs += [_spec(name, layer, 1, scale, config.num_kv_heads) for name in ("k_scale", "v_scale")]
    return KvLayout(
        block_size=config.block_size,
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        kv_dtype=kv.dtype,
        index_dtype=index.dtype,
        scale_convention=kv.scale_convention,
        index_schedule=schedule_in_words(config.sparse_layers, config.reusing_layers),
        specs=tuple(specs),
    )


def model_fingerprint(model_dir: Path | None, config: M3Config) -> str:
    """Hex digest that two workers must share to be paired: of the config as understood, and of the weight *files*.

    The config counts by meaning, so it does not matter in which form it is written. The weights count by their files
    (``digest_weights``): the same model in another form, or cut into other shards, has another fingerprint, and two
    workers that loaded different files are not paired. That errs on the safe side, and costs no reading of all bytes.
    Without a directory the weights are random ones (``random_weights``).
    """
    digest = hashlib.sha256(msgspec.json.encode(config, order="sorted"))
    if model_dir is None:
        digest.update(b"random weights")
    else:
        digest_weights(model_dir, digest)
    return digest.hexdigest()


def _cache_dtype(what: str, known: dict[str, CacheDtype], name: str) -> CacheDtype:
    if name not in known:
        raise ModelError(f"{what} dtype {name!r} is not one of auto, {', '.join(known)}")
    return known[name]


def _spec(name: str, layer: int, elements_per_token: int, stored: CacheDtype, num_heads: int = 0) -> RegionSpec:
    """Sharded by head, or replicated when no head count is given."""
    return RegionSpec(
        name=name,
        layer=layer,
        shard=Shard.BY_HEAD if num_heads else Shard.REPLICATED,
        num_heads=num_heads or 1,
        elements_per_token=elements_per_token,
        dtype=stored.dtype,
        itemsize=stored.itemsize,
    )
