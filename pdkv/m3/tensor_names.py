"""Which tensors of a checkpoint make up the model's weights, in each of the namings that checkpoints come in."""

from collections.abc import Collection
from dataclasses import dataclass
from math import prod

from pdkv.m3.model_config import M3Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Slot:
    """One weight of ours: ``parts`` joined along their first dimension and seen in ``shape``.

    ``exact`` ones stay float32 in every dtype.
    """

    parts: tuple[Part, ...]
    shape: Shape
    exact: bool = False


Slots = dict[str, Slot]
"""Field name of a weight struct to where it comes from."""


@dataclass(frozen=True)
class Naming:
    """How one kind of checkpoint calls its tensors."""

    title: str
    """For messages: whose names these are."""
    prefix: str
    """Of every tensor of the text model but the head."""
    lm_head: str
    released: bool
    """Released: each projection and each expert is a tensor of its own. Else fused, as transformers holds them."""

    @property
    def moe(self) -> str:
        return "block_sparse_moe." if self.released else "mlp."

    @property
    def indexer(self) -> str:
        return "index_" if self.released else "indexer."

    @property
    def router_bias(self) -> str:
        return "e_score_correction_bias" if self.released else "gate.e_score_correction_bias"


NAMINGS = (
    Naming("transformers' text model", "model.", "lm_head.weight", released=False),
    Naming("transformers' multimodal model", "model.language_model.", "lm_head.weight", released=False),
    Naming("the release", "language_model.model.", "language_model.lm_head.weight", released=True),
    Naming("the release's text model alone", "model.", "lm_head.weight", released=True),
)

VISION = "the vision tower"
DRAFTING = "drafting (MTP)"
UNUSED_PREFIXES = {
    "vision_tower.": VISION,
    "multi_modal_projector.": VISION,
    "patch_merge_mlp.": VISION,
    "model.vision_tower.": VISION,
    "model.multi_modal_projector.": VISION,
    "mtp.": DRAFTING,
    "model.mtp.": DRAFTING,
    "model.language_model.mtp.": DRAFTING,
    "language_model.model.mtp.": DRAFTING,
}
"""Tensors that a text model without drafting has no use for: what their names begin with, and what they are for."""


def unused(name: str) -> str | None:
    """What a tensor that we pass over is for; ``None`` for one that must be of the text model."""
    return next((purpose for prefix, purpose in UNUSED_PREFIXES.items() if name.startswith(prefix)), None)


def choose_naming(held: Collection[str], config: M3Config) -> Naming:
    """The naming of which a checkpoint holds the most names: not the config's form, for files may mix the two."""
    names = set(held)
    return max(NAMINGS, key=lambda naming: len(names & all_parts(naming, config).keys()))


def model_slots(naming: Naming, config: M3Config) -> Slots:
    """Fields of ``M3Weights`` that belong to no layer."""
    slots = {
        "embed": _one(naming.prefix + "embed_tokens.weight", config.vocab_size, config.hidden_size),
        "norm": _one(naming.prefix + "norm.weight", config.hidden_size, exact=True),
    }
    if not config.tie_word_embeddings:
        slots["lm_head"] = _one(naming.lm_head, config.vocab_size, config.hidden_size)
    return slots


def layer_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    """Fields of ``LayerWeights`` that every layer has."""
    prefix = _layer(naming, layer)
    hidden = config.hidden_size
    return {
        "input_norm": _one(prefix + "input_layernorm.weight", hidden, exact=True),
        "post_attention_norm": _one(prefix + "post_attention_layernorm.weight", hidden, exact=True),
    }


def attention_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    """Fields of ``AttentionWeights``; index fields only on sparse layers."""
    prefix = _layer(naming, layer) + "self_attn."
    hidden, dim = config.hidden_size, config.head_dim
    inputs = {
        "q_proj": config.num_heads * dim,
        "k_proj": config.num_kv_heads * dim,
        "v_proj": config.num_kv_heads * dim,
    }
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"}
    if config.sparse_layers[layer]:
        index = naming.indexer
        inputs |= {f"{index}q_proj": config.num_index_heads * config.index_dim, f"{index}k_proj": config.index_dim}
        norms |= {"index_q_norm": f"{index}q_norm", "index_k_norm": f"{index}k_norm"}
    slots = {field: _one(f"{prefix}{name}.weight", dim, exact=True) for field, name in norms.items()}
    parts = tuple(Part(f"{prefix}{name}.weight", (rows, hidden)) for name, rows in inputs.items())
    slots["inputs"] = Slot(parts, (sum(inputs.values()), hidden))
    slots["output"] = _one(prefix + "o_proj.weight", hidden, config.num_heads * dim)
    return slots


def dense_mlp_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    return _mlp_slots(naming, _layer(naming, layer) + "mlp.", config.dense_intermediate_size, config.hidden_size)


def shared_expert_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    prefix = f"{_layer(naming, layer)}{naming.moe}shared_experts."
    return _mlp_slots(naming, prefix, config.shared_intermediate_size, config.hidden_size)


def routed_expert_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    """Fields of ``MoeWeights`` but the shared expert."""
    prefix = _layer(naming, layer) + naming.moe
    experts, size, hidden = config.num_experts, config.expert_intermediate_size, config.hidden_size
    slots = {
        "router": _one(prefix + "gate.weight", experts, hidden, exact=True),
        "router_bias": _one(prefix + naming.router_bias, experts, exact=True),
        "gate_up": _one(prefix + "experts.gate_up_proj", experts, 2 * size, hidden),
        "down": _one(prefix + "experts.down_proj", experts, hidden, size),
    }
    if naming.released:  # w1 is the gate, w3 up, w2 down
        each = [f"{prefix}experts.{expert}." for expert in range(experts)]
        halves = tuple(Part(f"{expert}{half}.weight", (size, hidden)) for expert in each for half in ("w1", "w3"))
        downs = tuple(Part(f"{expert}w2.weight", (hidden, size)) for expert in each)
        slots["gate_up"] = Slot(halves, slots["gate_up"].shape)
        slots["down"] = Slot(downs, slots["down"].shape)
    return slots


def all_parts(naming: Naming, config: M3Config) -> dict[str, Shape]:
    """Every tensor that the checkpoint must hold, and no other, by name."""
    groups = [model_slots(naming, config)]
    for layer, moe in enumerate(config.moe_layers):
        groups += [layer_slots(naming, config, layer), attention_slots(naming, config, layer)]
        if moe:
            groups += [shared_expert_slots(naming, config, layer), routed_expert_slots(naming, config, layer)]
        else:
            groups.append(dense_mlp_slots(naming, config, layer))
    slots = [slot for group in groups for slot in group.values()]
    assert all(sum(prod(part.shape) for part in slot.parts) == prod(slot.shape) for slot in slots), "parts fill slots"
    return {part.name: part.shape for slot in slots for part in slot.parts}


def _layer(naming: Naming, layer: int) -> str:
    return f"{naming.prefix}layers.{layer}."


def _mlp_slots(naming: Naming, prefix: str, size: int, hidden: int) -> Slots:
    gate_up = _one(prefix + "gate_up_proj.weight", 2 * size, hidden)
    if naming.released:
        halves = tuple(Part(f"{prefix}{half}_proj.weight", (size, hidden)) for half in ("gate", "up"))
        gate_up = Slot(halves, gate_up.shape)
    return {"gate_up": gate_up, "down": _one(prefix + "down_proj.weight", hidden, size)}


def _one(name: str, *shape: int, exact: bool = False) -> Slot:
    return Slot((Part(name, shape),), shape, exact)
