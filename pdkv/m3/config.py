"""What a MiniMax-M3 text model is: its config, and the complete list of state that a token of it leaves behind."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from pdkv.errors import ModelError
from pdkv.m3.checkpoint import digest_weights
from pdkv.schema import KvLayout, RegionSpec, Shard

BLOCK_SIZE = 128
"""Tokens of a block; the indexer selects blocks of this size and a page holds one."""

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float8_e4m3fn": 1}
"""Bytes of one element of every dtype that state may be stored in."""

_MODEL_TYPE = "minimax_m3_vl_text"
_DTYPES = ("float32", "bfloat16")

_ATTENTION_KINDS = {"full_attention": False, "minimax_m3_sparse": True}
_MLP_KINDS = {"dense": False, "sparse": True}

_FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False, None),
    "attention_output_gate": (False, None),
    "hidden_act": ("silu", "swigluoai"),  # transformers writes silu and computes swigluoai
    "index_block_size": (BLOCK_SIZE,),
    "index_skip_topk_offset": (0, None),
    "index_topk_freq": (1, None),
    "index_topk_pattern": (None,),
    "model_type": (_MODEL_TYPE,),
    "n_shared_experts": (1,),
    "qk_norm_type": ("per_head",),
    "quantization_config": (None,),
    "rope_scaling": (None,),
    "scoring_func": ("sigmoid",),
    "sliding_window": (None,),
    "use_gemma_norm": (True,),
    "use_index_cache": (False, None),
    "use_qk_norm": (True,),
    "use_routing_bias": (True,),
}
"""Fields that change what is computed, with the only values that are implemented."""

_READ = """
    bos_token_id dense_intermediate_size dtype eos_token_id head_dim hidden_size index_head_dim
    index_local_blocks index_n_heads index_topk_blocks intermediate_size layer_types max_position_embeddings
    mlp_layer_types num_attention_heads num_experts_per_tok num_hidden_layers num_key_value_heads
    num_local_experts partial_rotary_factor rms_norm_eps rope_parameters rope_theta rotary_dim
    routed_scaling_factor shared_intermediate_size swiglu_alpha swiglu_beta swiglu_limit tie_word_embeddings
    torch_dtype vocab_size
""".split()  # noqa: SIM905  as prose it stays readable

_WITHOUT_EFFECT = """
    _name_or_path architectures attention_dropout auto_map chunk_size_feed_forward id2label initializer_range
    is_encoder_decoder label2id name_or_path num_mtp_modules num_nextn_predict_layers output_attentions
    output_hidden_states output_router_logits pad_token_id problem_type return_dict router_aux_loss_coef
    router_jitter_noise tokenizer_class transformers_version use_cache
""".split()  # noqa: SIM905
"""Fields of training, of drafting, of tokenizers and of transformers itself: they do not change a forward pass."""

_T = TypeVar("_T", int, float)


class M3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The text model, complete and checked; nothing downstream reads ``config.json`` again."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    """Leading dims of each head that are rotated; the rest passes through."""

    dense_intermediate_size: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    num_experts: int
    experts_per_token: int
    routed_scaling_factor: float
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    swiglu_beta: float = 1.0

    moe_layers: tuple[bool, ...]
    """For each layer: mixture of experts (true) or dense MLP."""
    sparse_layers: tuple[bool, ...]
    """For each layer: attention to selected blocks (true) or to all."""
    num_index_heads: int
    index_dim: int
    topk_blocks: int
    block_size: int = BLOCK_SIZE
    init_blocks: int = 0
    local_blocks: int = 1

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    """What the checkpoint's weights are stored in, and K/V and index keys unless told otherwise."""

    def __post_init__(self) -> None:
        problems = [text for broken, text in _rules(self) if broken]
        if problems:
            raise ModelError("the model config cannot be served: " + "; ".join(problems))


def _rules(c: M3Config) -> list[tuple[bool, str]]:
    """What must hold between fields, as (broken, what to say)."""
    rules = [
        (min(c.num_layers, c.hidden_size, c.num_kv_heads, c.head_dim, c.vocab_size) < 1, "sizes must be positive"),
        (
            c.num_heads % max(c.num_kv_heads, 1) != 0,
            f"{c.num_heads} q heads are no multiple of {c.num_kv_heads} kv heads",
        ),
        (len(c.moe_layers) != c.num_layers, f"{len(c.moe_layers)} MLP kinds for {c.num_layers} layers"),
        (len(c.sparse_layers) != c.num_layers, f"{len(c.sparse_layers)} attention kinds for {c.num_layers} layers"),
        (c.block_size != BLOCK_SIZE, f"block size is {c.block_size}, only {BLOCK_SIZE} is implemented"),
        (
            not 0 < c.rotary_dim <= c.head_dim or c.rotary_dim % 2 != 0,
            f"{c.rotary_dim} rotated dims of {c.head_dim} (must be even, at least 2 and at most the head)",
        ),
        (c.dtype not in _DTYPES, f"dtype {c.dtype} is not one of {', '.join(_DTYPES)}"),
    ]
    if any(c.moe_layers):
        rules.append(
            (
                not 0 < c.experts_per_token <= c.num_experts,
                f"{c.experts_per_token} experts per token of {c.num_experts} experts",
            )
        )
    if any(c.sparse_layers):
        rules += [
            (
                c.num_index_heads != c.num_kv_heads,
                f"{c.num_index_heads} index heads for {c.num_kv_heads} kv heads (one selection per kv head is needed)",
            ),
            (c.index_dim != c.head_dim, f"index dim {c.index_dim} differs from head dim {c.head_dim}"),
            (min(c.init_blocks, c.local_blocks) < 0, "init and local blocks cannot be negative"),
            (
                c.topk_blocks < max(1, c.init_blocks + c.local_blocks),
                f"top-k of {c.topk_blocks} blocks cannot hold {c.init_blocks} init and {c.local_blocks} local blocks",
            ),
        ]
    return rules


def load_config(model_dir: Path) -> M3Config:
    """Read the flat ``config.json`` that transformers writes for M3's text model.

    Raises ``ModelError`` that names every field whose value, or whose very presence, is not supported: an unknown
    field may change the answers, so it is refused rather than ignored.
    """
    path = Path(model_dir) / "config.json"
    try:
        raw = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist: --model must be a checkpoint directory with a config.json") from error
    except (OSError, msgspec.DecodeError) as error:
        raise ModelError(f"{path} cannot be read as a JSON object: {error}") from error
    _refuse_unsupported(raw, path)
    try:
        return _parse(raw)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _refuse_unsupported(raw: dict[str, Any], path: Path) -> None:
    refused = [
        f"{name} is {raw[name]!r}, only {' or '.join(repr(v) for v in allowed)} is implemented"
        for name, allowed in _FIXED.items()
        if name in raw and raw[name] not in allowed
    ]
    if "model_type" not in raw:
        refused.insert(0, f"model_type is missing, must be {_MODEL_TYPE!r}")
    known = {*_READ, *_WITHOUT_EFFECT, *_FIXED}
    refused += [
        f"{name} is not a field that pdkv knows (it may change the answers)"
        for name, value in sorted(raw.items())
        if name not in known and value is not None
    ]
    if refused:
        raise ModelError(f"{path} asks for what pdkv does not serve: " + "; ".join(refused))


def _parse(raw: dict[str, Any]) -> M3Config:
    num_layers = _number(raw, "num_hidden_layers", int)
    sparse = _kinds(raw, "layer_types", _ATTENTION_KINDS, num_layers, default=False)
    moe = _kinds(raw, "mlp_layer_types", _MLP_KINDS, num_layers, default=True)
    rope = _rope_parameters(raw)
    # Fields of a kind of layer that the model does not have may be absent.
    expert = None if any(moe) else 0
    index = None if any(sparse) else 0
    return M3Config(
        hidden_size=_number(raw, "hidden_size", int),
        num_layers=num_layers,
        num_heads=_number(raw, "num_attention_heads", int),
        num_kv_heads=_number(raw, "num_key_value_heads", int),
        head_dim=_number(raw, "head_dim", int),
        vocab_size=_number(raw, "vocab_size", int),
        max_position_embeddings=_number(raw, "max_position_embeddings", int),
        rms_norm_eps=_number(raw, "rms_norm_eps", float, 1e-6),
        rope_theta=_number(rope if "rope_theta" in rope else raw, "rope_theta", float),
        rotary_dim=_rotary_dim(raw, rope),
        dense_intermediate_size=_number(raw, "dense_intermediate_size", int, 0 if all(moe) else None),
        expert_intermediate_size=_number(raw, "intermediate_size", int, expert),
        shared_intermediate_size=_number(raw, "shared_intermediate_size", int, expert),
        num_experts=_number(raw, "num_local_experts", int, expert),
        experts_per_token=_number(raw, "num_experts_per_tok", int, expert),
        routed_scaling_factor=_number(raw, "routed_scaling_factor", float, 1.0),
        swiglu_alpha=_number(raw, "swiglu_alpha", float, 1.702),
        swiglu_limit=_number(raw, "swiglu_limit", float, 7.0),
        swiglu_beta=_number(raw, "swiglu_beta", float, 1.0),
        moe_layers=moe,
        sparse_layers=sparse,
        num_index_heads=_number(raw, "index_n_heads", int, index),
        index_dim=_number(raw, "index_head_dim", int, index),
        topk_blocks=_number(raw, "index_topk_blocks", int, index),
        # No default where there are sparse layers: engines disagree (0 or 1) about what absence means.
        local_blocks=_number(raw, "index_local_blocks", int, index),
        bos_token_id=None if raw.get("bos_token_id") is None else _number(raw, "bos_token_id", int),
        eos_token_ids=_eos_ids(raw),
        tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
        dtype=str(raw.get("dtype") or raw.get("torch_dtype") or "float32"),
    )


def _number(raw: dict[str, Any], name: str, kind: type[_T], default: _T | None = None) -> _T:
    value = raw.get(name)
    if value is None:
        if default is None:
            raise ModelError(f"{name} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int | kind):
        raise ModelError(f"{name} is {value!r}, must be {'a whole number' if kind is int else 'a number'}")
    return kind(value)


def _kinds(
    raw: dict[str, Any], name: str, kinds: dict[str, bool], num_layers: int, *, default: bool
) -> tuple[bool, ...]:
    names = raw.get(name)
    if names is None:
        return (default,) * num_layers
    if not isinstance(names, list):
        raise ModelError(f"{name} is {names!r}, must be a list with one kind a layer")
    unknown = sorted({str(kind) for kind in names if kind not in kinds})
    if unknown:
        raise ModelError(f"{name} has {', '.join(unknown)}; implemented are {', '.join(kinds)}")
    return tuple(kinds[kind] for kind in names)


def _rope_parameters(raw: dict[str, Any]) -> dict[str, Any]:
    rope = raw.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"rope_parameters is {rope!r}, must be an object")
    if rope.get("rope_type", "default") != "default":
        raise ModelError(f"rope_parameters.rope_type is {rope['rope_type']!r}, only 'default' is implemented")
    unknown = sorted(rope.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ModelError(f"rope_parameters.{', rope_parameters.'.join(unknown)} is not implemented")
    if "rope_theta" in rope and raw.get("rope_theta") not in (None, rope["rope_theta"]):
        raise ModelError(f"rope_theta is {raw['rope_theta']} and rope_parameters.rope_theta {rope['rope_theta']}")
    return rope


def _rotary_dim(raw: dict[str, Any], rope: dict[str, Any]) -> int:
    """Rotated dims: a share of the head in ``rope_parameters`` or beside it, else a count. They must not disagree."""
    head_dim = _number(raw, "head_dim", int)
    said: dict[str, int] = {}
    if rope.get("partial_rotary_factor") is not None:
        factor = _number(rope, "partial_rotary_factor", float)
        said[f"rope_parameters.partial_rotary_factor {factor}"] = int(head_dim * factor)
    if raw.get("partial_rotary_factor") is not None:
        factor = _number(raw, "partial_rotary_factor", float)
        said[f"partial_rotary_factor {factor}"] = int(head_dim * factor)
    if raw.get("rotary_dim") is not None:
        said["rotary_dim"] = _number(raw, "rotary_dim", int)
    if not said:
        raise ModelError("rope_parameters.partial_rotary_factor, partial_rotary_factor and rotary_dim are all missing")
    if len(set(said.values())) > 1:
        listed = ", ".join(f"{name} means {dims} dims" for name, dims in said.items())
        raise ModelError(f"the number of rotated dims is ambiguous for heads of {head_dim}: {listed}")
    return next(iter(said.values()))


def _eos_ids(raw: dict[str, Any]) -> tuple[int, ...]:
    value = raw.get("eos_token_id")
    ids = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
        raise ModelError(f"eos_token_id is {value!r}, must be a token id or a list of them")
    return tuple(ids)


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
    """Hex digest of the config and the weights (``digest_weights``): two workers must serve the same model."""
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
