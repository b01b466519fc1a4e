"""Which fields of a config.json pdkv implements, with which values, and which do not change an answer."""

from collections.abc import Iterator, Mapping

from pdkv.errors import ModelError
from pdkv.m3.config_fields import Fields
from pdkv.m3.index_schedule import NO_SCHEDULE
from pdkv.m3.quantisation import quantisation

BLOCK_SIZE = 128
"""Tokens of a block; the indexer selects blocks of this size and a page holds one."""

WRAPPER_TYPE = "minimax_m3_vl"
"""``model_type`` of a config whose text model is nested under ``text_config``."""


def _names(listed: str) -> frozenset[str]:
    """Of a list that stays readable as prose."""
    return frozenset(listed.split())


_ARCHITECTURES = (
    "MiniMaxM3SparseForConditionalGeneration",
    "MiniMaxM3SparseForCausalLM",
    "MiniMaxM3VLForCausalLM",
)
_TEXT_TYPES = ("minimax_m3_vl_text", "minimax_m3", "minimax_m3_text", WRAPPER_TYPE)

_FIXED: dict[str, tuple[object, ...]] = {
    "attention_bias": (False,),
    "attention_output_gate": (False,),
    "hidden_act": ("swigluoai",),
    "index_block_size": (BLOCK_SIZE,),
    "n_shared_experts": (1,),
    "qk_norm_type": ("per_head",),
    "quantization": (),
    "rope_scaling": (),
    "scoring_func": ("sigmoid",),
    "sliding_window": (),
    "use_gemma_norm": (True,),
    "use_qk_norm": (True,),
    "use_routing_bias": (True,),
}
"""Fields of the text model that change what is computed, with the only values implemented (none: must be absent)."""

_FIXED_SPARSE: dict[str, tuple[object, ...]] = {"sparse_block_size": (BLOCK_SIZE,), "sparse_score_type": ("max",)}

_TRANSFORMERS_ONLY = _names(
    "index_head_dim index_local_blocks index_n_heads index_topk_blocks layer_types mlp_layer_types"
)
"""Fields that only transformers writes: it says silu and computes swigluoai, and names layers instead of numbering."""

_READ = _names("""
    architectures bos_token_id dense_intermediate_size dtype eos_token_id head_dim hidden_size intermediate_size
    max_position_embeddings model_type moe_layer_freq num_attention_heads num_experts_per_tok num_hidden_layers
    num_key_value_heads num_local_experts partial_rotary_factor quantization_config rms_norm_eps rope_parameters
    rope_theta rotary_dim routed_scaling_factor shared_intermediate_size sparse_attention_config swiglu_alpha
    swiglu_beta swiglu_limit tie_word_embeddings torch_dtype vocab_size
""")

_READ_SPARSE = _names("""
    sparse_attention_freq sparse_disable_index_value sparse_index_dim sparse_init_block sparse_local_block
    sparse_num_index_heads sparse_topk_blocks use_sparse_attention
""")

_WITHOUT_EFFECT = _names("""
    _name_or_path attention_dropout auto_map chunk_size_feed_forward id2label initializer_range is_encoder_decoder
    label2id name_or_path num_mtp_modules num_nextn_predict_layers output_attentions output_hidden_states
    output_router_logits pad_token_id problem_type return_dict router_aux_loss_coef router_jitter_noise
    tokenizer_class transformers_version use_cache
""")
"""Fields of training, of drafting, of tokenizers and of transformers itself: they do not change a forward pass."""

_SHARED = _names("bos_token_id dtype eos_token_id quantization_config tie_word_embeddings torch_dtype")
"""Fields that are read from beside ``text_config`` too."""

_VISION_PREFIXES = ("image_", "img_", "multimodal_projector", "process_image", "projector_", "video_", "vision_")
_VISION = frozenset(["merged_hidden_size", "text_config"])


def speaks_transformers(text: Fields) -> bool:
    """Whether the text model's fields are those that transformers writes, not the released ones."""
    return any(text.has(name) for name in _TRANSFORMERS_ONLY)


def unsupported(text: Fields, wrapper: Fields) -> list[str]:
    """Why this config cannot be served, one entry a field. ``wrapper`` holds what stands beside a nested text model.

    An unknown field may change the answers, so it is refused rather than ignored.
    """
    fixed = dict(_FIXED)
    if speaks_transformers(text):
        fixed["hidden_act"] = ("silu", "swigluoai")
    sparse = text.inner("sparse_attention_config")
    known = _READ | _WITHOUT_EFFECT | _TRANSFORMERS_ONLY | NO_SCHEDULE.keys()
    return [
        *_wrong_model(text, wrapper),
        *_refused(text, fixed, known),
        *_refused(sparse, _FIXED_SPARSE, _READ_SPARSE),
        *_misplaced(text, wrapper),
        *_quantised_otherwise(text, wrapper),
    ]


def _wrong_model(text: Fields, wrapper: Fields) -> Iterator[str]:
    nested = bool(wrapper.values)
    outer = wrapper if nested else text
    architectures = outer.values.get("architectures")
    known = isinstance(architectures, list) and any(name in _ARCHITECTURES for name in architectures)
    if architectures is not None and not known:
        yield f"architectures is {architectures!r}, served are {', '.join(_ARCHITECTURES)}"
    allowed = (WRAPPER_TYPE,) if nested else _TEXT_TYPES
    if not outer.has("model_type") and not known:
        yield f"model_type is missing, must be {' or '.join(map(repr, allowed))}"
    if outer.has("model_type") and outer.values["model_type"] not in allowed:
        yield f"model_type is {outer.values['model_type']!r}, only {' or '.join(map(repr, allowed))} is implemented"
    if nested and text.values.get("model_type") not in (*_TEXT_TYPES, None, ""):
        yield f"{text.named('model_type')} is {text.values['model_type']!r}, which is not MiniMax-M3's text model"


def _refused(fields: Fields, fixed: Mapping[str, tuple[object, ...]], known: frozenset[str]) -> Iterator[str]:
    for name, allowed in fixed.items():
        if fields.has(name) and fields.values[name] not in allowed:
            served = f"only {' or '.join(map(repr, allowed))} is implemented" if allowed else "it is not implemented"
            yield f"{fields.named(name)} is {fields.values[name]!r}, {served}"
    for name in sorted(fields.values.keys() - known - fixed.keys()):
        if fields.has(name):
            yield f"{fields.named(name)} is not a field that pdkv knows (it may change the answers)"


def _quantised_otherwise(text: Fields, wrapper: Fields) -> Iterator[str]:
    try:
        quantisation(text, wrapper)
    except ModelError as error:
        yield str(error)


def _misplaced(text: Fields, wrapper: Fields) -> Iterator[str]:
    """Fields of the text model that stand beside it: harmless when they repeat what it says or what is served."""
    ours = _READ | _TRANSFORMERS_ONLY | _FIXED.keys() | NO_SCHEDULE.keys()
    for name in sorted(wrapper.values):
        value = wrapper.values[name]
        harmless = _SHARED | _WITHOUT_EFFECT | _VISION | {"architectures", "model_type"}
        if value is None or name in harmless or name.startswith(_VISION_PREFIXES):
            continue
        if value in NO_SCHEDULE.get(name, ()) and not text.has(name):
            continue
        if name not in ours:
            yield f"{name} is not a field that pdkv knows (it may change the answers)"
        elif value != text.values.get(name) and value not in _FIXED.get(name, ()):
            yield f"{name} is {value!r} beside text_config, where it has no effect: it belongs inside"
