"""Which tensors of a checkpoint make up the model's weights: the table that a second naming would be added to."""

from dataclasses import dataclass

from pdkv.m3.config import M3Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint."""

    name: str
    shape: Shape


@dataclass(frozen=True)
class Slot:
    """One weight of ours: parts joined along their first dimension. ``exact`` ones stay float32 in every dtype."""

    parts: tuple[Part, ...]
    exact: bool = False


Slots = dict[str, Slot]
"""Field name of a weight struct to where it comes from."""


def model_slots(config: M3Config) -> Slots:
    """Fields of ``M3Weights`` that belong to no layer, as transformers names them."""
    slots = {
        "embed": _one("model.embed_tokens.weight", config.vocab_size, config.hidden_size),
        "norm": _one("model.norm.weight", config.hidden_size, exact=True),
    }
    if not config.tie_word_embeddings:
        slots["lm_head"] = _one("lm_head.weight", config.vocab_size, config.hidden_size)
    return slots


def layer_slots(config: M3Config, layer: int) -> Slots:
    """Fields of ``LayerWeights`` that every layer has."""
    prefix = f"model.layers.{layer}."
    hidden = config.hidden_size
    return {
        "input_norm": _one(prefix + "input_layernorm.weight", hidden, exact=True),
        "post_attention_norm": _one(prefix + "post_attention_layernorm.weight", hidden, exact=True),
    }


def attention_slots(config: M3Config, layer: int) -> Slots:
    """Fields of ``AttentionWeights``; index fields only on sparse layers."""
    prefix = f"model.layers.{layer}.self_attn."
    hidden, dim = config.hidden_size, config.head_dim
    inputs = [
        Part(prefix + "q_proj.weight", (config.num_heads * dim, hidden)),
        Part(prefix + "k_proj.weight", (config.num_kv_heads * dim, hidden)),
        Part(prefix + "v_proj.weight", (config.num_kv_heads * dim, hidden)),
    ]
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"}
    if config.sparse_layers[layer]:
        inputs += [
            Part(prefix + "indexer.q_proj.weight", (config.num_index_heads * config.index_dim, hidden)),
            Part(prefix + "indexer.k_proj.weight", (config.index_dim, hidden)),
        ]
        norms |= {"index_q_norm": "indexer.q_norm", "index_k_norm": "indexer.k_norm"}
    slots = {field: _one(f"{prefix}{name}.weight", dim, exact=True) for field, name in norms.items()}
    slots["inputs"] = Slot(tuple(inputs))
    slots["output"] = _one(prefix + "o_proj.weight", hidden, config.num_heads * dim)
    return slots


def dense_mlp_slots(config: M3Config, layer: int) -> Slots:
    return _mlp_slots(f"model.layers.{layer}.mlp.", config.dense_intermediate_size, config.hidden_size)


def shared_expert_slots(config: M3Config, layer: int) -> Slots:
    prefix = f"model.layers.{layer}.mlp.shared_experts."
    return _mlp_slots(prefix, config.shared_intermediate_size, config.hidden_size)


def routed_expert_slots(config: M3Config, layer: int) -> Slots:
    """Fields of ``MoeWeights`` but the shared expert."""
    prefix = f"model.layers.{layer}.mlp."
    experts, size, hidden = config.num_experts, config.expert_intermediate_size, config.hidden_size
    return {
        "router": _one(prefix + "gate.weight", experts, hidden, exact=True),
        "router_bias": _one(prefix + "gate.e_score_correction_bias", experts, exact=True),
        "gate_up": _one(prefix + "experts.gate_up_proj", experts, 2 * size, hidden),
        "down": _one(prefix + "experts.down_proj", experts, hidden, size),
    }


def all_parts(config: M3Config) -> dict[str, Shape]:
    """Every tensor that the checkpoint must hold, and no other, by name."""
    groups = [model_slots(config)]
    for layer, moe in enumerate(config.moe_layers):
        groups += [layer_slots(config, layer), attention_slots(config, layer)]
        if moe:
            groups += [shared_expert_slots(config, layer), routed_expert_slots(config, layer)]
        else:
            groups.append(dense_mlp_slots(config, layer))
    return {part.name: part.shape for slots in groups for slot in slots.values() for part in slot.parts}


def _mlp_slots(prefix: str, size: int, hidden: int) -> Slots:
    return {
        "gate_up": _one(prefix + "gate_up_proj.weight", 2 * size, hidden),
        "down": _one(prefix + "down_proj.weight", hidden, size),
    }


def _one(name: str, *shape: int, exact: bool = False) -> Slot:
    return Slot((Part(name, shape),), exact)
