"""The model's weights as its layers use them, read from safetensors files and checked against the config."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pdkv.m3 import tensor_names
from pdkv.m3.model_config import M3Config
from pdkv.m3.tensor_files import TensorFiles
from pdkv.m3.tensor_names import Naming, Slot, Slots


@dataclass(frozen=True)
class MlpWeights:
    gate_up: Tensor  # [2 * size, hidden], all gates before all ups
    down: Tensor  # [hidden, size]


@dataclass(frozen=True)
class MoeWeights:
    router: Tensor  # float32 [num_experts, hidden]
    router_bias: Tensor  # float32 [num_experts], for the choice only
    gate_up: Tensor  # [num_experts, 2 * size, hidden]
    down: Tensor  # [num_experts, hidden, size]
    shared: MlpWeights


@dataclass(frozen=True)
class AttentionWeights:
    """Those of one rank; its heads are neighbours."""

    num_heads: int
    num_kv_heads: int
    num_index_heads: int  # 0 on dense layers
    inputs: Tensor  # [q | k | v, on sparse layers also index_q | index_k, hidden], dims of all heads of each
    output: Tensor  # [hidden, num_heads * head_dim]
    q_norm: Tensor  # float32 [head_dim], as all norms
    k_norm: Tensor
    index_q_norm: Tensor | None = None
    index_k_norm: Tensor | None = None


@dataclass(frozen=True)
class LayerWeights:
    input_norm: Tensor  # float32 [hidden]
    post_attention_norm: Tensor  # float32 [hidden]
    attention: AttentionWeights
    mlp: MlpWeights | MoeWeights


@dataclass(frozen=True)
class M3Weights:
    """Everything on one device; matrices in one dtype, norms and router in float32."""

    embed: Tensor  # [vocab, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # float32 [hidden]
    lm_head: Tensor  # [vocab, hidden]


def load_weights(model_dir: Path, config: M3Config, device: str, dtype: torch.dtype) -> M3Weights:
    """Read all weights. ``config.dtype`` is what matrices are rounded to, ``dtype`` what they are held in.

    Takes the names of the release and those of transformers. Raises one ``CheckpointError`` that lists every missing,
    extra, mis-shaped or mis-typed tensor.
    """
    with ExitStack() as stack:
        files = TensorFiles(model_dir, stack)
        naming = tensor_names.choose_naming(files.names, config)
        files.check(naming, tensor_names.all_parts(naming, config))
        return _assemble(_Reader(files, device, getattr(torch, config.dtype), dtype), naming, config)


def _assemble(reader: "_Reader", naming: Naming, config: M3Config) -> M3Weights:
    top = reader.read(tensor_names.model_slots(naming, config))
    layers = []
    for layer, moe in enumerate(config.moe_layers):
        mlp: MlpWeights | MoeWeights
        if moe:
            shared = MlpWeights(**reader.read(tensor_names.shared_expert_slots(naming, config, layer)))
            mlp = MoeWeights(**reader.read(tensor_names.routed_expert_slots(naming, config, layer)), shared=shared)
        else:
            mlp = MlpWeights(**reader.read(tensor_names.dense_mlp_slots(naming, config, layer)))
        attention = AttentionWeights(
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            num_index_heads=config.num_index_heads if config.sparse_layers[layer] else 0,
            **reader.read(tensor_names.attention_slots(naming, config, layer)),
        )
        norms = reader.read(tensor_names.layer_slots(naming, config, layer))
        layers.append(LayerWeights(**norms, attention=attention, mlp=mlp))
    lm_head = top["embed"] if config.tie_word_embeddings else top["lm_head"]
    return M3Weights(embed=top["embed"], layers=tuple(layers), norm=top["norm"], lm_head=lm_head)


@dataclass(frozen=True)
class _Reader:
    """Joins, rounds and places the parts of weights."""

    files: TensorFiles
    device: str
    rounded: torch.dtype
    held: torch.dtype

    def read(self, slots: Slots) -> dict[str, Tensor]:
        return {field: self._whole(slot) for field, slot in slots.items()}

    def _whole(self, slot: Slot) -> Tensor:
        """Part by part into place, so that nothing but one part is ever in memory twice."""
        rounded, held = (torch.float32, torch.float32) if slot.exact else (self.rounded, self.held)
        whole = torch.empty(slot.shape, dtype=held, device=self.device)
        rows = whole.view(-1, *slot.parts[0].shape[1:])  # the parts' first dimensions, one after the other
        begin = 0
        for part in slot.parts:
            end = begin + part.shape[0]
            rows[begin:end] = self.files.tensor(part.name).to(rounded)
            begin = end
        assert begin == len(rows), f"{slot.parts[0].name}: parts of {begin} rows in a weight of {len(rows)}"
        return whole
