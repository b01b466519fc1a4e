"""The released dimensions with fewer layers: what can be run, on random weights, where the whole does not fit."""

import json
from pathlib import Path


def write_config(directory: Path, num_layers: int, num_dense: int) -> None:
    """Write the config.json of MiniMax-M3 with only so many layers, the first of them dense. Creates the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config(num_layers, num_dense), indent=2))


def config(num_layers: int, num_dense: int) -> dict[str, object]:
    """As transformers writes it."""
    sparse = [layer >= num_dense for layer in range(num_layers)]
    return {
        "architectures": ["MiniMaxM3VLForCausalLM"],
        "bos_token_id": None,
        "dense_intermediate_size": 12_288,
        "dtype": "bfloat16",
        "eos_token_id": None,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 6144,
        "index_block_size": 128,
        "index_head_dim": 128,
        "index_local_blocks": 1,
        "index_n_heads": 4,
        "index_topk_blocks": 16,
        "intermediate_size": 3072,
        "layer_types": ["minimax_m3_sparse" if it else "full_attention" for it in sparse],
        "max_position_embeddings": 524_288,
        "mlp_layer_types": ["sparse" if it else "dense" for it in sparse],
        "model_type": "minimax_m3_vl_text",
        "num_attention_heads": 64,
        "num_experts_per_tok": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 4,
        "num_local_experts": 128,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": 0.5, "rope_theta": 5e6, "rope_type": "default"},
        "rotary_dim": 64,
        "routed_scaling_factor": 2.0,
        "shared_intermediate_size": 3072,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": 200_064,
    }
