"""The released config.json, nested or of the text model alone: what is read, what absence means, what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdkv.errors import ModelError
from pdkv.m3.config import M3Config, load_config
from tests.checkpoints import SMALL, released_config

FLAT = {**SMALL, "dtype": "bfloat16", "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.0}
FLAT |= {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "tie_word_embeddings": False}
SPARSE = "text_config.sparse_attention_config."


def changed(path: str, value: Any, text_only: bool = False) -> dict[str, Any]:
    """The released config with one field set, by its path; ``...`` takes it away."""
    raw = copy.deepcopy(released_config(FLAT, text_only))
    *outer, name = path.split(".")
    target = raw
    for key in outer:
        target = target[key]
    if value is ...:
        del target[name]
    else:
        target[name] = value
    return raw


def load(directory: Path, raw: dict[str, Any], **generation: object) -> M3Config:
    (directory / "config.json").write_text(json.dumps(raw))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return load_config(directory)


@pytest.fixture
def expected() -> M3Config:
    return M3Config(
        hidden_size=64,
        num_layers=4,
        num_heads=8,
        num_kv_heads=4,
        head_dim=32,
        vocab_size=320,
        max_position_embeddings=131072,
        rms_norm_eps=1e-6,
        rope_theta=5e6,
        rotary_dim=16,
        dense_intermediate_size=96,
        expert_intermediate_size=48,
        shared_intermediate_size=40,
        num_experts=4,
        experts_per_token=2,
        routed_scaling_factor=2.0,
        moe_layers=(False, True, True, True),
        sparse_layers=(False, True, True, True),
        num_index_heads=4,
        index_dim=32,
        topk_blocks=2,
        dtype="bfloat16",
    )


@pytest.mark.parametrize("text_only", [False, True])
def test_reads_the_released_form(tmp_path: Path, expected: M3Config, text_only: bool):
    assert load(tmp_path, released_config(FLAT, text_only)) == expected


def test_the_architecture_names_a_text_model_too(tmp_path: Path, expected: M3Config):
    assert load(tmp_path, changed("model_type", ..., text_only=True)) == expected


@pytest.mark.parametrize(
    ("path", "means"),
    [
        ("rms_norm_eps", {}),
        ("swiglu_alpha", {}),
        ("swiglu_limit", {}),
        ("use_gemma_norm", {}),
        ("attention_output_gate", {}),
        ("hidden_act", {}),
        ("use_qk_norm", {}),
        ("qk_norm_type", {}),
        ("n_shared_experts", {}),
        ("scoring_func", {}),
        ("use_routing_bias", {}),
        ("tie_word_embeddings", {}),
        ("rotary_dim", {}),
        ("partial_rotary_factor", {}),
        ("num_mtp_modules", {}),
        ("routed_scaling_factor", {"routed_scaling_factor": 1.0}),
        ("moe_layer_freq", {"moe_layers": (True,) * 4}),
        ("sparse_attention_config.sparse_block_size", {}),
        ("sparse_attention_config.sparse_score_type", {}),
        ("sparse_attention_config.sparse_init_block", {}),
        ("sparse_attention_config.sparse_local_block", {}),
        ("sparse_attention_config.sparse_disable_index_value", {}),
        ("sparse_attention_config.use_sparse_attention", {"sparse_layers": (False,) * 4}),
        ("sparse_attention_config.sparse_attention_freq", {"sparse_layers": (False,) * 4}),
    ],
)
def test_absent_fields(tmp_path: Path, expected: M3Config, path: str, means: dict[str, Any]):
    assert load(tmp_path, changed(f"text_config.{path}", ...)) == msgspec.structs.replace(expected, **means)
    if "sparse_attention_config" not in path:
        null = load(tmp_path, changed(f"text_config.{path}", None))
        assert null == msgspec.structs.replace(expected, **means)


def test_no_sparse_attention_config_means_no_sparse_layers(tmp_path: Path, expected: M3Config):
    config = load(tmp_path, changed("text_config.sparse_attention_config", ...))
    assert config.sparse_layers == (False,) * 4
    assert load(tmp_path, changed(f"{SPARSE}use_sparse_attention", False)).sparse_layers == (False,) * 4


def test_swiglu_beta_is_not_in_the_file_and_is_one(tmp_path: Path):
    assert load(tmp_path, released_config(FLAT)).swiglu_beta == 1.0
    assert load(tmp_path, changed("text_config.swiglu_beta", 0.5)).swiglu_beta == 0.5


def test_half_of_a_head_is_rotated_where_nothing_says_so(tmp_path: Path):
    raw = changed("text_config.rotary_dim", ...)
    del raw["text_config"]["partial_rotary_factor"]
    assert load(tmp_path, raw).rotary_dim == 16


@pytest.mark.parametrize(
    ("path", "value", "field", "read"),
    [
        ("text_config.rope_parameters", {"partial_rotary_factor": 0.5}, "rotary_dim", 16),
        (f"{SPARSE}sparse_init_block", 1, "init_blocks", 1),
        (f"{SPARSE}sparse_local_block", 2, "local_blocks", 2),
        (f"{SPARSE}sparse_disable_index_value", True, "sparse_layers", (False, True, True, True)),
        (f"{SPARSE}sparse_attention_freq", [1, 0, 1, 0], "sparse_layers", (True, False, True, False)),
        ("text_config.index_topk_blocks", 2, "topk_blocks", 2),
        ("text_config.torch_dtype", "float32", "dtype", "float32"),
        ("use_index_cache", False, "topk_blocks", 2),
        ("hidden_size", 64, "hidden_size", 64),
    ],
)
def test_other_values_that_are_served(tmp_path: Path, path: str, value: object, field: str, read: object):
    raw = changed(path, value)
    if path.endswith("freq"):
        raw["text_config"]["sparse_attention_config"]["sparse_disable_index_value"] = value
    assert getattr(load(tmp_path, raw), field) == read


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        ("architectures", ["MiniMaxM3MTP"], "architectures is ['MiniMaxM3MTP']"),
        ("model_type", "llava", "model_type is 'llava'"),
        ("text_config.model_type", "llama", "text_config.model_type is 'llama'"),
        ("text_config.attention_output_gate", True, "text_config.attention_output_gate is True"),
        ("text_config.use_gemma_norm", False, "text_config.use_gemma_norm is False"),
        ("text_config.use_qk_norm", False, "text_config.use_qk_norm is False"),
        ("text_config.qk_norm_type", "per_layer", "text_config.qk_norm_type is 'per_layer', only 'per_head'"),
        ("text_config.hidden_act", "silu", "text_config.hidden_act is 'silu', only 'swigluoai'"),
        ("text_config.scoring_func", "softmax", "text_config.scoring_func is 'softmax', only 'sigmoid'"),
        ("text_config.use_routing_bias", False, "text_config.use_routing_bias is False"),
        ("text_config.n_shared_experts", 2, "text_config.n_shared_experts is 2"),
        ("text_config.n_shared_experts", 0, "text_config.n_shared_experts is 0"),
        ("text_config.rope_scaling", {"rope_type": "yarn"}, "text_config.rope_scaling is {'rope_type': 'yarn'}"),
        ("text_config.rope_parameters", {"rope_type": "yarn"}, "text_config.rope_parameters.rope_type is 'yarn'"),
        ("text_config.rope_theta", ..., "rope_theta is missing"),
        ("text_config.rotary_dim", 8, "number of rotated dims of a head of 32 is ambiguous"),
        ("text_config.rope_parameters", {"partial_rotary_factor": 1.0}, "is ambiguous"),
        ("text_config.quantization_config", {"bits": 8}, "text_config.quantization_config"),
        ("quantization_config", {"quant_method": "awq"}, "quantization_config.quant_method is 'awq', served are plain"),
        ("quantization", {"bits": 4}, "quantization is {'bits': 4}"),
        ("compression_config", {}, "compression_config is not a field"),
        ("text_config.use_index_cache", "yes", "text_config.use_index_cache is 'yes'"),
        ("index_topk_freq", 4, "index_topk_freq is 4 beside text_config"),
        ("use_index_cache", True, "use_index_cache is True beside text_config"),
        ("index_topk_pattern", "FS", "index_topk_pattern is 'FS' beside text_config"),
        ("index_skip_topk_offset", 1, "index_skip_topk_offset is 1 beside text_config"),
        ("num_hidden_layers", 5, "num_hidden_layers is 5 beside text_config"),
        ("text_config.mystery_gate", 1, "text_config.mystery_gate is not a field"),
        (f"{SPARSE}sparse_block_size", 64, f"{SPARSE}sparse_block_size is 64, only 128"),
        (f"{SPARSE}sparse_score_type", "lse", f"{SPARSE}sparse_score_type is 'lse', only 'max'"),
        (f"{SPARSE}sparse_init_tokens", 128, f"{SPARSE}sparse_init_tokens is not a field"),
        (f"{SPARSE}sparse_disable_index_value", [0, 1, 0, 1], "leaves the index value branch on in layers 2, "),
        (f"{SPARSE}sparse_disable_index_value", 0, "leaves the index value branch on in layers 1, 2, 3, "),
        (f"{SPARSE}sparse_disable_index_value", [0, 1], "has 2 entries for 4 layers"),
        (f"{SPARSE}sparse_topk_blocks", ..., f"{SPARSE}sparse_topk_blocks is missing"),
        (f"{SPARSE}sparse_attention_freq", [0, 1], "2 attention kinds for 4 layers"),
        (f"{SPARSE}sparse_attention_freq", 1, f"{SPARSE}sparse_attention_freq is 1, must be a list"),
        (f"{SPARSE}sparse_num_index_heads", 2, "2 index heads for 4 kv heads"),
        (f"{SPARSE}sparse_local_block", 3, "cannot hold 0 init and 3 local"),
        ("text_config.moe_layer_freq", [0, 1, 2, 1], "text_config.moe_layer_freq is [0, 1, 2, 1]"),
        ("text_config.moe_layer_freq", [0], "1 MLP kinds for 4 layers"),
        ("text_config.head_dim", ..., "text_config.head_dim is missing"),
        ("tie_word_embeddings", True, "tie_word_embeddings is ambiguous"),
        ("text_config.index_topk_blocks", 3, "index_topk_blocks is ambiguous: text_config.index_topk_blocks says 3"),
        ("text_config.layer_types", ["full_attention"] * 4, "which layers are sparse is ambiguous"),
        ("text_config.mlp_layer_types", ["sparse"] * 4, "which layers have experts is ambiguous"),
        ("text_config", [], "text_config is [], must be an object"),
    ],
)
def test_refuses_by_name(tmp_path: Path, path: str, value: object, named: str):
    with pytest.raises(ModelError) as caught:
        load(tmp_path, changed(path, value))
    assert named in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_one_error_names_all_that_is_refused(tmp_path: Path):
    raw = changed("text_config.use_gemma_norm", False)
    raw["text_config"]["sparse_attention_config"]["sparse_score_type"] = "lse"
    raw["quantization_config"] = {"bits": 4}
    with pytest.raises(ModelError, match=r"use_gemma_norm.*sparse_score_type.*quantization_config"):
        load(tmp_path, raw)


def test_end_tokens_of_every_file_count(tmp_path: Path):
    raw = released_config(FLAT)
    assert load(tmp_path, raw).eos_token_ids == ()
    config = load(tmp_path, raw, eos_token_id=7, bos_token_id=4)
    assert (config.eos_token_ids, config.bos_token_id) == ((7,), 4)
    raw["eos_token_id"] = [7, 8]
    raw["text_config"]["eos_token_id"] = 9
    raw["text_config"]["bos_token_id"] = 3
    config = load(tmp_path, raw)
    assert (config.eos_token_ids, config.bos_token_id) == ((9, 7, 8), 3)
    with pytest.raises(ModelError, match=r"generation_config\.json's eos_token_id is 'x'"):
        load(tmp_path, raw, eos_token_id="x")
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ModelError, match=r"generation_config\.json cannot be read"):
        load_config(tmp_path)
