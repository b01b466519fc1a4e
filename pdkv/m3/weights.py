"""The model's weights as its layers use them, read from safetensors files and checked against the config."""

import logging
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from pdkv.m3 import tensor_names
from pdkv.m3.checkpoint import weight_files
from pdkv.m3.model_config import M3Config
from pdkv.m3.sharding import ModelShare, model_share
from pdkv.m3.tensor_check import check
from pdkv.m3.tensor_files import TensorFiles, read_catalogue
from pdkv.m3.tensor_names import Naming, Slot, Slots

_LOG = logging.getLogger("pdkv.m3")


@dataclass(frozen=True)
class MlpWeights:
    """Of one rank's columns of the intermediate size: what ``down`` gives is its part of a sum."""

    gate_up: Tensor  # [2 * size, hidden], all gates before all ups
    down: Tensor  # [hidden, size]


@dataclass(frozen=True)
class MoeWeights:
    """The router is whole on every rank; of the experts a rank has some, or some columns of all."""

    router: Tensor  # float32 [num_experts, hidden]
    router_bias: Tensor  # float32 [num_experts], for the choice only
    gate_up: Tensor  # [held experts, 2 * size, hidden]
    down: Tensor  # [held experts, hidden, size]
    experts: range  # which of all these are
    shared: MlpWeights


@dataclass(frozen=True)
class AttentionWeights:
    """Of one rank's heads, which are neighbours; there is one index head for each kv head, and one index key."""

    inputs: Tensor  # [q | k | v, on sparse layers also index_q | index_k, hidden], dims of all heads of each
    output: Tensor  # [hidden, num_heads * head_dim]; what it gives is a part of a sum
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
    """One rank's share on one device; matrices in one dtype, norms and router in float32.

    Every rank has as many rows of ``embed`` and ``lm_head``; those behind its last token are zeros.
    """

    embed: Tensor  # [vocab_rows, hidden]
    layers: tuple[LayerWeights, ...]
    norm: Tensor  # float32 [hidden]
    lm_head: Tensor  # [vocab_rows, hidden]
    vocab: range  # tokens of the leading rows


def load_weights(
    model_dir: Path, config: M3Config, device: str, dtype: torch.dtype, share: ModelShare | None = None
) -> M3Weights:
    """Read the weights of one rank, and nothing else; all of them without a share.

    ``config.dtype`` is what matrices are rounded to, ``dtype`` what they are held in. MXFP8 weights are not rounded
    but to what they are held in: float32 and bfloat16 hold them exactly. Memory stays near the share: parts are copied
    a few rows at a time.

    Takes the names of the release and those of transformers. Raises one ``CheckpointError`` that lists every missing,
    extra, mis-shaped or mis-typed tensor of the whole checkpoint, whichever rank asks.
    """
    catalogue = read_catalogue(model_dir, weight_files(model_dir))
    naming = check(catalogue, config)
    with TensorFiles(catalogue) as files:
        reader = _Reader(files, device, getattr(torch, config.dtype), dtype)
        share = share or model_share(config)
        held = weight_bytes(config, share, dtype.itemsize), str(dtype).removeprefix("torch.")
        _LOG.info("rank %d of %d holds %d bytes of weights, matrices in %s", share.rank, share.size, *held)
        return assemble_weights(reader, naming, config, share)


def weight_bytes(config: M3Config, share: ModelShare, itemsize: int) -> int:
    """Memory of one rank's weights when a matrix element takes ``itemsize`` bytes; norms and routers take 4."""
    slots = tensor_names.all_slots(tensor_names.NAMINGS[0], config, share)
    return sum(prod(slot.shape) * (4 if slot.exact else itemsize) for slot in slots)


class WeightSource(Protocol):
    """Where the tensors of a model come from."""

    def read(self, slots: Slots) -> dict[str, Tensor]:
        """One whole tensor for each slot, in its shape."""
        ...


def assemble_weights(reader: WeightSource, naming: Naming, config: M3Config, share: ModelShare) -> M3Weights:
    """All weights of one rank, layer by layer."""
    top = reader.read(tensor_names.model_slots(naming, config, share))
    layers = []
    for layer, moe in enumerate(config.moe_layers):
        mlp: MlpWeights | MoeWeights
        if moe:
            shared = MlpWeights(**reader.read(tensor_names.shared_expert_slots(naming, config, layer, share)))
            routed = reader.read(tensor_names.routed_expert_slots(naming, config, layer, share))
            mlp = MoeWeights(**routed, experts=share.experts, shared=shared)
        else:
            mlp = MlpWeights(**reader.read(tensor_names.dense_mlp_slots(naming, config, layer, share)))
        attention = AttentionWeights(**reader.read(tensor_names.attention_slots(naming, config, layer, share)))
        norms = reader.read(tensor_names.layer_slots(naming, config, layer))
        layers.append(LayerWeights(**norms, attention=attention, mlp=mlp))
    lm_head = top["embed"] if config.tie_word_embeddings else top["lm_head"]
    return M3Weights(embed=top["embed"], layers=tuple(layers), norm=top["norm"], lm_head=lm_head, vocab=share.vocab)


@dataclass(frozen=True)
class _Reader:
    """Joins, rounds and places the parts of weights."""

    files: TensorFiles
    device: str
    rounded: torch.dtype
    held: torch.dtype

    def read(self, slots: Slots) -> dict[str, Tensor]:
        return {field: self._joined(slot) for field, slot in slots.items()}

    def _joined(self, slot: Slot) -> Tensor:
        """Part by part into place, so that nothing but some rows of one part is ever in memory twice."""
        held = torch.float32 if slot.exact else self.held
        whole = torch.empty(slot.shape, dtype=held, device=self.device)
        rows = whole.view(-1, slot.shape[-1]) if len(slot.shape) > 1 else whole
        begin = 0
        for part in slot.parts:
            as_it_is = slot.exact or self.files.is_quantised(part.name)
            for chunk in self.files.read(part):
                end = begin + len(chunk)
                rows[begin:end] = chunk if as_it_is else chunk.to(self.rounded)
                begin = end
        rows[begin:] = 0
        return whole
