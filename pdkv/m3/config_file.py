"""Reads ``config.json`` in the released form (nested or text only) or in transformers' own, into one ``M3Config``."""

from pathlib import Path
from typing import Any

from pdkv.errors import ModelError
from pdkv.m3.config_fields import Fields, agreed, read_json_object
from pdkv.m3.config_support import speaks_transformers, unsupported
from pdkv.m3.index_schedule import IndexScheduleOverride, reusing_layers
from pdkv.m3.model_config import M3Config
from pdkv.m3.quantisation import quantisation

_ATTENTION_KINDS = {"full_attention": False, "minimax_m3_sparse": True}
_MLP_KINDS = {"dense": False, "sparse": True}
_ROTATED_SHARE = 0.5
"""Of a head, where a released config leaves it out."""


def load_config(model_dir: Path, schedule: IndexScheduleOverride | None = None) -> M3Config:
    """Read a checkpoint's ``config.json``, and the end tokens of its ``generation_config.json`` where there is one.

    Two vocabularies are understood, each alone or nested under ``text_config``: the released one
    (``sparse_attention_config``, ``moe_layer_freq``) and transformers' (``index_*``, ``layer_types``). Raises one
    ``ModelError`` that names every field whose value, or whose very presence, is not supported: an unknown field may
    change the answers, so it is refused rather than ignored. ``schedule`` goes before the file's own.
    """
    path = Path(model_dir) / "config.json"
    try:
        raw = read_json_object(path)
    except FileNotFoundError as error:
        raise ModelError(f"{path} does not exist: --model must be a checkpoint directory with a config.json") from error
    try:
        text, wrapper = _unnested(raw)
        refused = unsupported(text, wrapper)
        if refused:
            raise ModelError("asks for what pdkv does not serve: " + "; ".join(refused))
        return _parse(text, wrapper, _generation_fields(Path(model_dir)), schedule)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from error


def _unnested(raw: dict[str, Any]) -> tuple[Fields, Fields]:
    """The text model's fields, and those beside it where it is nested."""
    whole = Fields(raw)
    return (whole.inner("text_config"), whole) if whole.has("text_config") else (whole, Fields({}))


def _generation_fields(model_dir: Path) -> Fields:
    try:
        return Fields(read_json_object(model_dir / "generation_config.json"), "generation_config.json's ")
    except FileNotFoundError:
        return Fields({})


def _parse(
    text: Fields, wrapper: Fields, generation: Fields, schedule: IndexScheduleOverride | None = None
) -> M3Config:
    num_layers = text.number("num_hidden_layers", int)
    sparse = _sparse_layers(text, num_layers)
    moe = _moe_layers(text, num_layers)
    _refuse_index_value(text, sparse, num_layers)
    # Fields of a kind of layer that the model does not have may be absent.
    expert = None if any(moe) else 0
    index = None if any(sparse) else 0
    bos = next((f for f in (text, wrapper, generation) if f.has("bos_token_id")), None)
    return M3Config(
        hidden_size=text.number("hidden_size", int),
        num_layers=num_layers,
        num_heads=text.number("num_attention_heads", int),
        num_kv_heads=text.number("num_key_value_heads", int),
        head_dim=text.number("head_dim", int),
        vocab_size=text.number("vocab_size", int),
        max_position_embeddings=text.number("max_position_embeddings", int),
        rms_norm_eps=text.number("rms_norm_eps", float, 1e-6),
        rope_theta=_rope_theta(text),
        rotary_dim=_rotary_dim(text),
        dense_intermediate_size=text.number("dense_intermediate_size", int, 0 if all(moe) else None),
        expert_intermediate_size=text.number("intermediate_size", int, expert),
        shared_intermediate_size=text.number("shared_intermediate_size", int, expert),
        num_experts=text.number("num_local_experts", int, expert),
        experts_per_token=text.number("num_experts_per_tok", int, expert),
        routed_scaling_factor=text.number("routed_scaling_factor", float, 1.0),
        swiglu_alpha=text.number("swiglu_alpha", float, 1.702),
        swiglu_limit=text.number("swiglu_limit", float, 7.0),
        swiglu_beta=text.number("swiglu_beta", float, 1.0),
        moe_layers=moe,
        sparse_layers=sparse,
        num_index_heads=_index_number(text, "index_n_heads", "sparse_num_index_heads", index),
        index_dim=_index_number(text, "index_head_dim", "sparse_index_dim", index),
        topk_blocks=_index_number(text, "index_topk_blocks", "sparse_topk_blocks", index),
        init_blocks=text.inner("sparse_attention_config").number("sparse_init_block", int, 0),
        local_blocks=_index_number(text, "index_local_blocks", "sparse_local_block", 1 if any(sparse) else 0),
        reusing_layers=reusing_layers(text, sparse, schedule),
        bos_token_id=bos.number("bos_token_id", int) if bos else None,
        eos_token_ids=_eos_ids(text, wrapper, generation),
        tie_word_embeddings=_tied(text, wrapper),
        dtype=_dtype(text, wrapper),
        quantisation=quantisation(text, wrapper),
    )


def _sparse_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it attends to selected blocks. None does where the config is silent."""
    said = {}
    if text.has("layer_types"):
        said[text.named("layer_types")] = text.kinds("layer_types", _ATTENTION_KINDS)
    sparse = text.inner("sparse_attention_config")
    if sparse.values:
        on = sparse.flag("use_sparse_attention", False) and sparse.has("sparse_attention_freq")
        flags = sparse.flags("sparse_attention_freq") if on else (False,) * num_layers
        said[sparse.named("sparse_attention_freq")] = flags
    return agreed("which layers are sparse", said, (False,) * num_layers)


def _moe_layers(text: Fields, num_layers: int) -> tuple[bool, ...]:
    """For each layer, whether it has experts. Every one does where the config is silent."""
    said = {}
    if text.has("mlp_layer_types"):
        said[text.named("mlp_layer_types")] = text.kinds("mlp_layer_types", _MLP_KINDS)
    if text.has("moe_layer_freq"):
        said[text.named("moe_layer_freq")] = text.flags("moe_layer_freq")
    return agreed("which layers have experts", said, (True,) * num_layers)


def _refuse_index_value(text: Fields, sparse_layers: tuple[bool, ...], num_layers: int) -> None:
    """The released model has the indexer's value branch switched off on every sparse layer; absent means so too."""
    fields, name = text.inner("sparse_attention_config"), "sparse_disable_index_value"
    if not fields.has(name):
        return
    is_list = isinstance(fields.values[name], list)
    disabled = fields.flags(name) if is_list else (fields.flag(name, True),) * num_layers
    if len(disabled) != num_layers:
        raise ModelError(f"{fields.named(name)} has {len(disabled)} entries for {num_layers} layers")
    pairs = zip(sparse_layers, disabled, strict=False)  # a wrong number of sparse layers is refused by M3Config
    enabled = [layer for layer, (is_sparse, is_off) in enumerate(pairs) if is_sparse and not is_off]
    if enabled:
        raise ModelError(
            f"{fields.named(name)} leaves the index value branch on in layers {', '.join(map(str, enabled))}, "
            f"only 1 on every sparse layer is implemented"
        )


def _index_number(text: Fields, flat: str, released: str, default: int | None) -> int:
    """A number of the indexer by either of its names."""
    sparse = text.inner("sparse_attention_config")
    said = {f.named(name): f.number(name, int) for f, name in ((text, flat), (sparse, released)) if f.has(name)}
    what = text.named(flat) if speaks_transformers(text) else sparse.named(released)
    return agreed(what, said, default)


def _rope_parameters(text: Fields) -> Fields:
    rope = text.inner("rope_parameters")
    if rope.values.get("rope_type", "default") != "default":
        raise ModelError(f"{rope.named('rope_type')} is {rope.values['rope_type']!r}, only 'default' is implemented")
    unknown = sorted(rope.values.keys() - {"rope_type", "rope_theta", "partial_rotary_factor"})
    if unknown:
        raise ModelError(f"{', '.join(map(rope.named, unknown))} is not implemented")
    return rope


def _rope_theta(text: Fields) -> float:
    places = (_rope_parameters(text), text)
    said = {f.named("rope_theta"): f.number("rope_theta", float) for f in places if f.has("rope_theta")}
    return agreed("rope_theta", said)


def _rotary_dim(text: Fields) -> int:
    """Rotated dims: a share of the head in ``rope_parameters`` or beside it, else a count. They must not disagree."""
    head_dim = text.number("head_dim", int)
    said: dict[str, int] = {}
    for fields in (_rope_parameters(text), text):
        if fields.has("partial_rotary_factor"):
            factor = fields.number("partial_rotary_factor", float)
            said[f"{fields.named('partial_rotary_factor')} {factor}"] = int(head_dim * factor)
    if text.has("rotary_dim"):
        said[text.named("rotary_dim")] = text.number("rotary_dim", int)
    if not said and speaks_transformers(text):
        raise ModelError("rope_parameters.partial_rotary_factor, partial_rotary_factor and rotary_dim are all missing")
    return agreed(f"the number of rotated dims of a head of {head_dim}", said, int(head_dim * _ROTATED_SHARE))


def _eos_ids(*places: Fields) -> tuple[int, ...]:
    """Every end token that any of the files names: the released config leaves it to ``generation_config.json``."""
    return tuple(dict.fromkeys(token for fields in places for token in fields.token_ids("eos_token_id")))


def _tied(text: Fields, wrapper: Fields) -> bool:
    name = "tie_word_embeddings"
    return agreed(name, {f.named(name): f.flag(name, False) for f in (text, wrapper) if f.has(name)}, False)


def _dtype(text: Fields, wrapper: Fields) -> str:
    said = [f.values[name] for f in (text, wrapper) for name in ("dtype", "torch_dtype") if f.has(name)]
    return str(said[0]) if said else "float32"
