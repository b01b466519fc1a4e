"""Random M3-like checkpoints written by transformers, and its own model as the oracle for them."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import DynamicCache, MiniMaxM3VLForCausalLM, MiniMaxM3VLTextConfig
from transformers.utils.logging import disable_progress_bar

from pdkv.verify.equality import Logits, is_decisive

disable_progress_bar()

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rotary_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e6, "partial_rotary_factor": 0.5},
    "intermediate_size": 48,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 40,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
    "index_n_heads": 4,
    "index_head_dim": 32,
    "index_topk_blocks": 2,
    "index_local_blocks": 1,
    "max_position_embeddings": 131072,
    "bos_token_id": 1,
    "eos_token_id": None,
}
"""One dense layer, three sparse ones, two blocks a query: from 257 tokens on the selection matters."""


def write_random_checkpoint(
    directory: Path, seed: int, dtype: torch.dtype = torch.float32, **overrides: object
) -> None:
    """``SMALL`` with overrides (fields of transformers' config), random weights, as ``save_pretrained`` writes it.

    Every weight is random, norms and the router's bias too (transformers would leave them 0), and at a scale where
    attention is sharp: wrong state shows in the logits.
    """
    config = MiniMaxM3VLTextConfig(**{**SMALL, **overrides})
    model = MiniMaxM3VLForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(".inv_freq"):
                continue
            noise = torch.randn(weight.shape, generator=generator)
            if weight.dim() == 1:
                centre = 1.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else 0.0
                weight.copy_(centre + 0.2 * noise)
            else:
                weight.copy_(noise if "embed" in name else noise / weight.shape[-1] ** 0.5)
    model.to(dtype).save_pretrained(directory)


@dataclass(frozen=True)
class OracleCase:
    """A prompt and what transformers answers to it."""

    prompt: list[int]
    tokens: list[int]
    """Greedy continuation, blind to any end token."""
    logits: Logits
    """[num_tokens, vocab]: row i gave token i."""


class Oracle:
    """transformers' own model of a checkpoint; maths in float32 whatever the weights are stored in."""

    def __init__(self, directory: Path) -> None:
        self._model = MiniMaxM3VLForCausalLM.from_pretrained(
            directory, attn_implementation="eager", dtype=torch.float32
        ).eval()
        self.vocab_size = int(self._model.config.vocab_size)

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int, chunk: int = 512) -> OracleCase:
        cache = DynamicCache(config=self._model.config)
        for begin in range(0, len(prompt), chunk):
            row = self._step(prompt[begin : begin + chunk], cache)[-1]
        rows, tokens = [row], [int(row.argmax())]
        while len(tokens) < num_tokens:
            rows.append(self._step(tokens[-1:], cache)[-1])
            tokens.append(int(rows[-1].argmax()))
        return OracleCase(prompt, tokens, torch.stack(rows).numpy())

    @torch.no_grad()
    def logits(self, token_ids: list[int], chunk: int = 512) -> Logits:
        """What follows each token: [num_tokens, vocab]."""
        cache = DynamicCache(config=self._model.config)
        rows = [self._step(token_ids[begin : begin + chunk], cache, 0) for begin in range(0, len(token_ids), chunk)]
        return torch.cat(rows).numpy()

    def case(self, length: int, num_tokens: int, seed: int) -> OracleCase:
        """A random prompt whose answer hangs on no near tie: others are drawn again, as the equality rule wants."""
        generator = np.random.default_rng([seed, length])
        for _ in range(5):
            case = self.greedy(generator.integers(3, self.vocab_size, length).tolist(), num_tokens)
            if is_decisive(case.logits):
                return case
        raise AssertionError(f"five prompts of {length} tokens in a row have near ties: the checkpoint is odd")

    def _step(self, token_ids: list[int], cache: DynamicCache, keep: int = 1) -> torch.Tensor:
        out = self._model(torch.tensor([token_ids]), past_key_values=cache, logits_to_keep=keep)
        return out.logits[0].float()  # [keep or num_tokens, vocab]


def oracle_greedy(directory: Path, prompt: list[int], num_tokens: int) -> tuple[list[int], Logits]:
    """Tokens and the logits that gave them, [num_tokens, vocab]; loads the checkpoint anew, so hold an ``Oracle``
    where several prompts are asked."""
    case = Oracle(directory).greedy(prompt, num_tokens)
    return case.tokens, case.logits


VISION = {
    "model_type": "minimax_m3_vl_vision",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
"""As little of a vision tower as transformers accepts."""

RELEASED_TOP = {
    "image_seq_length": 576,
    "image_token_index": 317,
    "multimodal_projector_bias": True,
    "process_image_mode": "dynamic_res",
    "projector_hidden_act": "gelu",
    "video_token_index": 318,
    "vision_feature_layer": -1,
    "vision_feature_select_strategy": "full",
}
"""What stands beside ``text_config`` in the released config."""


def write_released_form(
    src_dir: Path, dst_dir: Path, shards: int = 3, with_vision: bool = True, text_only: bool = False
) -> None:
    """Rewrite what ``write_random_checkpoint`` wrote as MiniMax-M3 is released: its names, its nested config, end
    tokens in ``generation_config.json`` alone, shards with an index (``shards`` = 1: one file, none).

    ``text_only``: as the text model would be released without the vision tower, flat and with plain prefixes.
    """
    dst_dir.mkdir(parents=True, exist_ok=True)
    raw = json.loads((src_dir / "config.json").read_text())
    tensors = released_tensors(load_file(src_dir / "model.safetensors"), "" if text_only else "language_model.")
    if with_vision and not text_only:
        tensors |= _vision_tensors(raw["hidden_size"])
    ends = {"bos_token_id": raw["bos_token_id"], "eos_token_id": raw["eos_token_id"]}
    _write_json(dst_dir / "config.json", released_config(raw, text_only))
    _write_json(dst_dir / "generation_config.json", {"do_sample": True, "temperature": 1.0, "top_p": 0.95, **ends})
    write_shards(dst_dir, tensors, shards)


def write_shards(directory: Path, tensors: dict[str, torch.Tensor], shards: int) -> None:
    """Tensors of one layer are spread over all shards."""
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[shard::shards]}, directory / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    _write_json(
        directory / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )


def released_tensors(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """transformers' fused tensors as the release names and cuts them."""
    out: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        new = prefix + name
        sparse = name.replace(".mlp.", ".block_sparse_moe.")
        if ".mlp.experts." in name:
            for expert, matrix in enumerate(tensor):
                stem = f"{prefix}{sparse.rsplit('.', 1)[0]}.{expert}."
                parts = (
                    {"w2": matrix}
                    if name.endswith("down_proj")
                    else dict(zip(("w1", "w3"), matrix.chunk(2), strict=True))
                )
                out |= {f"{stem}{part}.weight": half.clone() for part, half in parts.items()}
            continue
        if ".mlp.gate." in name or ".mlp.shared_experts." in name:
            new = prefix + sparse.replace("gate.e_score", "e_score")
        new = new.replace(".self_attn.indexer.", ".self_attn.index_")
        if name.endswith("gate_up_proj.weight"):
            gate, up = tensor.chunk(2)
            out[new.replace("gate_up", "gate")], out[new.replace("gate_up", "up")] = gate.clone(), up.clone()
        else:
            out[new] = tensor.clone()
    return out


def released_config(raw: dict[str, Any], text_only: bool = False) -> dict[str, Any]:
    """transformers' flat config in the release's words."""
    sparse = [int(kind == "minimax_m3_sparse") for kind in raw["layer_types"]]
    same = """
        dense_intermediate_size head_dim hidden_size intermediate_size max_position_embeddings num_attention_heads
        num_experts_per_tok num_hidden_layers num_key_value_heads num_local_experts rms_norm_eps rotary_dim
        routed_scaling_factor shared_intermediate_size swiglu_alpha swiglu_limit tie_word_embeddings vocab_size
    """.split()  # noqa: SIM905
    text = {name: raw[name] for name in same} | {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "attention_output_gate": False,
        "hidden_act": "swigluoai",
        "moe_layer_freq": [int(kind == "sparse") for kind in raw["mlp_layer_types"]],
        "n_shared_experts": 1,
        "num_mtp_modules": 7,
        "num_nextn_predict_layers": 1,
        "partial_rotary_factor": raw["rope_parameters"]["partial_rotary_factor"],
        "qk_norm_type": "per_head",
        "rope_theta": raw["rope_parameters"]["rope_theta"],
        "scoring_func": "sigmoid",
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": sparse,
            "sparse_block_size": 128,
            "sparse_disable_index_value": sparse,
            "sparse_index_dim": raw["index_head_dim"],
            "sparse_init_block": 0,
            "sparse_local_block": raw["index_local_blocks"],
            "sparse_num_index_heads": raw["index_n_heads"],
            "sparse_score_type": "max",
            "sparse_topk_blocks": raw["index_topk_blocks"],
        },
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "use_routing_bias": True,
    }
    if text_only:
        return {**text, "model_type": "minimax_m3", "torch_dtype": raw["dtype"]}
    return {
        **RELEASED_TOP,
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "projector_hidden_size": raw["hidden_size"],
        "text_config": text,
        "torch_dtype": raw["dtype"],
        "transformers_version": "4.52.4",
        "vision_config": VISION,
    }


def _vision_tensors(hidden: int) -> dict[str, torch.Tensor]:
    """A random vision tower and projector under their released names."""
    size, inner = 32, 48
    tower = "vision_tower.vision_model."
    layer = tower + "encoder.layers.0."
    shapes: dict[str, tuple[int, ...]] = {tower + "embeddings.patch_embedding.weight": (size, 3, 2, 14, 14)}
    for norm in (f"{tower}pre_layrnorm", f"{layer}layer_norm1", f"{layer}layer_norm2"):
        shapes |= {f"{norm}.weight": (size,), f"{norm}.bias": (size,)}
    linear = {f"{layer}self_attn.{name}_proj": (size, size) for name in ("q", "k", "v", "out")}
    linear |= {f"{layer}mlp.fc1": (inner, size), f"{layer}mlp.fc2": (size, inner)}
    linear |= {"multi_modal_projector.linear_1": (hidden, size), "multi_modal_projector.linear_2": (hidden, hidden)}
    linear |= {"patch_merge_mlp.linear_1": (hidden, 4 * hidden), "patch_merge_mlp.linear_2": (hidden, hidden)}
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2))
