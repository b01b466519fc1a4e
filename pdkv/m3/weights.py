"""The model's weights as its layers use them, read from safetensors files and checked against the config."""

from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pdkv.errors import CheckpointError
from pdkv.m3 import tensor_names
from pdkv.m3.checkpoint import weight_files
from pdkv.m3.config import M3Config
from pdkv.m3.tensor_names import Slots

_FLOATS = {"F32", "BF16", "F16"}
"""Names that safetensors gives to the dtypes that weights may be stored in."""


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

    Raises one ``CheckpointError`` that lists every missing, extra, mis-shaped or mis-typed tensor.
    """
    with ExitStack() as stack:
        checkpoint = _Checkpoint(model_dir, stack, device, getattr(torch, config.dtype), dtype)
        checkpoint.check(tensor_names.all_parts(config))
        return _assemble(checkpoint, config)


def _assemble(checkpoint: "_Checkpoint", config: M3Config) -> M3Weights:
    top = checkpoint.read(tensor_names.model_slots(config))
    layers = []
    for layer, moe in enumerate(config.moe_layers):
        mlp: MlpWeights | MoeWeights
        if moe:
            shared = MlpWeights(**checkpoint.read(tensor_names.shared_expert_slots(config, layer)))
            mlp = MoeWeights(**checkpoint.read(tensor_names.routed_expert_slots(config, layer)), shared=shared)
        else:
            mlp = MlpWeights(**checkpoint.read(tensor_names.dense_mlp_slots(config, layer)))
        attention = AttentionWeights(**checkpoint.read(tensor_names.attention_slots(config, layer)))
        norms = checkpoint.read(tensor_names.layer_slots(config, layer))
        layers.append(LayerWeights(**norms, attention=attention, mlp=mlp))
    lm_head = top["embed"] if config.tie_word_embeddings else top["lm_head"]
    return M3Weights(embed=top["embed"], layers=tuple(layers), norm=top["norm"], lm_head=lm_head)


class _Checkpoint:
    """Open files of one checkpoint; ``stack`` owns them."""

    def __init__(self, model_dir: Path, stack: ExitStack, device: str, stored: torch.dtype, held: torch.dtype) -> None:
        self._model_dir, self._device, self._stored, self._held = model_dir, device, stored, held
        self._files: dict[str, Any] = {}  # tensor name to the open file that holds it
        for path in weight_files(model_dir):
            try:
                file = stack.enter_context(safe_open(path, framework="pt", device="cpu"))
            except (OSError, SafetensorError) as error:
                raise CheckpointError(f"{path} cannot be read as safetensors: {error}") from error
            self._files |= dict.fromkeys(file.keys(), file)

    def check(self, wanted: dict[str, tuple[int, ...]]) -> None:
        problems = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in self._files]
        problems += [f"extra: {name}" for name in sorted(self._files.keys() - wanted.keys())]
        for name in sorted(wanted.keys() & self._files.keys()):
            view = self._files[name].get_slice(name)
            if tuple(view.get_shape()) != wanted[name]:
                problems.append(f"mis-shaped: {name} is {view.get_shape()}, the config asks for {list(wanted[name])}")
            if view.get_dtype() not in _FLOATS:
                problems.append(f"mis-typed: {name} is {view.get_dtype()}, served are {', '.join(sorted(_FLOATS))}")
        if problems:
            listed = "\n  ".join(problems)
            raise CheckpointError(
                f"the tensors in {self._model_dir} do not fit its config.json, {len(problems)} problems "
                f"(expected are the names that transformers' save_pretrained writes):\n  {listed}"
            )

    def read(self, slots: Slots) -> dict[str, Tensor]:
        """The weight of every slot, joined, rounded and placed."""
        weights = {}
        for field, slot in slots.items():
            parts = [self._files[part.name].get_tensor(part.name) for part in slot.parts]
            whole = parts[0] if len(parts) == 1 else torch.cat(parts)
            whole = whole.float() if slot.exact else whole.to(self._stored).to(self._held)
            weights[field] = whole.to(self._device).contiguous()
        return weights
