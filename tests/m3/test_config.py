"""What config.json is accepted, what is refused by name, and the list of state that a model leaves behind."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pdkv.errors import ModelError
from pdkv.m3.config import M3Config, kv_layout, load_config, model_fingerprint
from pdkv.m3.model import load_model
from pdkv.schema import Shard
from tests.checkpoints import write_random_checkpoint


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("written")
    write_random_checkpoint(directory, 0, eos_token_id=[2, 5])
    return json.loads((directory / "config.json").read_text())


def load(tmp_path: Path, raw: dict[str, Any], **changes: Any) -> M3Config:
    """``...`` as a value takes the field away."""
    merged = {name: value for name, value in {**raw, **changes}.items() if value is not ...}
    (tmp_path / "config.json").write_text(json.dumps(merged))
    return load_config(tmp_path)


def test_reads_what_transformers_writes(tmp_path: Path, written: dict[str, Any]):
    config = load(tmp_path, written)
    assert config == M3Config(
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
        bos_token_id=1,
        eos_token_ids=(2, 5),
    )
    assert (config.swiglu_alpha, config.swiglu_limit, config.swiglu_beta) == (1.702, 7.0, 1.0)


def test_fields_of_the_released_config_pass_through_transformers(tmp_path: Path):
    released_fields = {
        "hidden_act": "swigluoai",
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "n_shared_experts": 1,
        "attention_output_gate": False,
        "num_mtp_modules": 7,
        "moe_layer_freq": [0, 0, 1, 1],
        "mlp_layer_types": None,
        "layer_types": None,
        "partial_rotary_factor": 0.5,
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": [0, 1, 0, 1],
            "sparse_num_index_heads": 4,
            "sparse_index_dim": 32,
            "sparse_topk_blocks": 3,
            "sparse_block_size": 128,
            "sparse_score_type": "max",
            "sparse_init_block": 0,
            "sparse_local_block": 2,
        },
    }
    write_random_checkpoint(tmp_path, 0, **released_fields)
    config = load_config(tmp_path)
    assert config.moe_layers == (False, False, True, True)
    assert config.sparse_layers == (False, True, False, True)
    assert (config.topk_blocks, config.local_blocks, config.rotary_dim) == (3, 2, 16)
    load_model(tmp_path)


def test_absent_fields_get_the_models_defaults(tmp_path: Path, written: dict[str, Any]):
    gone = ["rms_norm_eps", "swiglu_alpha", "swiglu_limit", "routed_scaling_factor", "mlp_layer_types", "dtype"]
    config = load(tmp_path, written, **dict.fromkeys(gone, ...))
    assert (config.rms_norm_eps, config.swiglu_alpha, config.swiglu_limit) == (1e-6, 1.702, 7.0)
    assert (config.routed_scaling_factor, config.dtype) == (1.0, "float32")
    assert config.moe_layers == (True,) * 4
    assert load(tmp_path, written, index_local_blocks=...).local_blocks == 1
    assert load(tmp_path, written, layer_types=...).sparse_layers == (False,) * 4
    assert load(tmp_path, written, eos_token_id=None).eos_token_ids == ()
    assert load(tmp_path, written, eos_token_id=7).eos_token_ids == (7,)


ROPE = {"rope_type": "default", "rope_theta": 5e6}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "rotary_dim": ...}, 16),
        ({"rope_parameters": {**ROPE, "partial_rotary_factor": 1.0}, "rotary_dim": 32}, 32),
        ({"rope_parameters": ROPE, "partial_rotary_factor": 0.25, "rotary_dim": ...}, 8),
        ({"rope_parameters": ROPE, "rotary_dim": 12}, 12),
        ({"rope_parameters": ..., "rope_theta": 5e6, "rotary_dim": 12}, 12),
    ],
)
def test_rotated_dims(tmp_path: Path, written: dict[str, Any], fields: dict[str, Any], expected: int):
    config = load(tmp_path, written, **fields)
    assert (config.rotary_dim, config.rope_theta) == (expected, 5e6)


@pytest.mark.parametrize(
    "fields",
    [
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "rotary_dim": 64},
        {"rope_parameters": {**ROPE, "partial_rotary_factor": 0.5}, "partial_rotary_factor": 0.25},
        {"rope_parameters": ROPE, "partial_rotary_factor": 0.5, "rotary_dim": 32},
    ],
)
def test_two_counts_of_rotated_dims_that_disagree(tmp_path: Path, written: dict[str, Any], fields: dict[str, Any]):
    with pytest.raises(ModelError, match="ambiguous"):
        load(tmp_path, written, **fields)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"model_type": ..., "architectures": ...}, "model_type is missing"),
        ({"architectures": ["LlamaForCausalLM"]}, "architectures is ['LlamaForCausalLM']"),
        ({"index_block_size": 64}, "index_block_size is 64"),
        ({"attention_output_gate": True}, "attention_output_gate is True"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"mystery_gate": 1}, "mystery_gate is not a field"),
        ({"layer_types": ["full_attention", "mamba", "full_attention", "full_attention"]}, "layer_types has mamba"),
        ({"layer_types": ["full_attention"]}, "1 attention kinds for 4 layers"),
        ({"rope_parameters": {**ROPE, "rope_type": "yarn"}}, "rope_type is 'yarn'"),
        ({"rope_parameters": {**ROPE, "factor": 4.0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_theta is missing"),
        ({"head_dim": ...}, "head_dim is missing"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"index_n_heads": 2}, "2 index heads for 4 kv heads"),
        ({"index_head_dim": 64}, "index dim 64 differs from head dim 32"),
        ({"index_local_blocks": 3}, "cannot hold 0 init and 3 local"),
        ({"index_topk_blocks": ...}, "index_topk_blocks is missing"),
        ({"num_attention_heads": 6}, "6 q heads"),
        ({"num_experts_per_tok": 5}, "5 experts per token of 4"),
        ({"dtype": "float64"}, "dtype float64"),
        ({"rotary_dim": 15, "rope_parameters": ROPE}, "15 rotated dims"),
    ],
)
def test_refuses_by_name(tmp_path: Path, written: dict[str, Any], fields: dict[str, Any], named: str):
    with pytest.raises(ModelError) as caught:
        load(tmp_path, written, **fields)
    assert named in str(caught.value)
    assert str(tmp_path / "config.json") in str(caught.value)


def test_refuses_what_is_no_config(tmp_path: Path):
    with pytest.raises(ModelError, match="does not exist"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ModelError, match="cannot be read as a JSON object"):
        load_config(tmp_path)


def released() -> M3Config:
    flags = (False,) * 3 + (True,) * 57
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
        moe_layers=flags,
        sparse_layers=flags,
        num_index_heads=4,
        index_dim=128,
        topk_blocks=16,
        dtype="bfloat16",
    )


def test_layout_of_the_released_model_has_the_known_sizes():
    def row_bytes(kv_dtype: str, index_dtype: str) -> int:
        specs = kv_layout(released(), kv_dtype, index_dtype).specs
        return sum(128 * spec.num_heads * spec.elements_per_token * spec.itemsize for spec in specs)

    assert row_bytes("float8_e4m3fn", "float8_e4m3fn") == 933_888 + 4 * 2_027_520
    assert row_bytes("bfloat16", "bfloat16") == 60 * 262_144 + 57 * 32_768


def test_layout_lists_every_region_once():
    layout = kv_layout(released(), "float8_e4m3fn", "bfloat16")
    listed = [(spec.name, spec.layer) for spec in layout.specs]
    expected = [("index_k", layer) for layer in range(3, 60)]
    expected += [(name, layer) for layer in range(60) for name in ("k", "v", "k_scale", "v_scale")]
    assert listed == expected
    assert layout.scale_convention == "per-token-head-f32-absmax/448-e4m3fn"
    for spec in layout.specs:
        assert spec.shard is (Shard.REPLICATED if spec.name == "index_k" else Shard.BY_HEAD)
        assert spec.num_heads == (1 if spec.name == "index_k" else 4)
        assert spec.elements_per_token == (1 if spec.name.endswith("scale") else 128)
        assert spec.dtype == {"index_k": "bfloat16", "k": "float8_e4m3fn", "v": "float8_e4m3fn"}.get(
            spec.name, "float32"
        )


def test_layout_without_fp8_has_no_scales_and_unknown_dtypes_are_refused():
    layout = kv_layout(released(), "bfloat16", "bfloat16")
    assert {spec.name for spec in layout.specs} == {"k", "v", "index_k"}
    assert layout.scale_convention == "none"
    with pytest.raises(ModelError, match="index dtype 'int4'"):
        kv_layout(released(), "bfloat16", "int4")


def test_fingerprint_tells_checkpoints_apart(tmp_path: Path):
    directories = [tmp_path / name for name in ("one", "same", "other")]
    for directory, seed in zip(directories, (1, 1, 2), strict=True):
        write_random_checkpoint(directory, seed)
    config = load_config(directories[0])
    prints = [model_fingerprint(directory, config) for directory in directories]
    assert prints[0] == prints[1]
    assert prints[2] != prints[0]
    other = msgspec.structs.replace(config, rope_theta=1e6)
    assert model_fingerprint(directories[0], other) != prints[0]
