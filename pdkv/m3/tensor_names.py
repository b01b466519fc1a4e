"""Which tensors of a checkpoint make up the model's weights, in each of the namings that checkpoints come in."""

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import prod

from pdkv.m3.model_config import M3Config
from pdkv.m3.sharding import ModelShare, model_share

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Part:
    """One tensor of a checkpoint, and the piece of it that a rank takes."""

    name: str
    shape: Shape
    """Of the whole tensor."""
    taken: tuple[range, ...]
    """Of each of its dimensions."""
    exact: bool = False
    """Stays float32 in every dtype, and is never stored quantised."""

    @property
    def num_elements(self) -> int:
        return prod(map(len, self.taken))


@dataclass(frozen=True)
class Slot:
    """One weight of ours: pieces joined along their rows and seen in ``shape``, a rank's.

    Where they do not fill it the rest is zeros.
    """

    parts: tuple[Part, ...]
    shape: Shape

    @property
    def exact(self) -> bool:
        return any(part.exact for part in self.parts)


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


def model_slots(naming: Naming, config: M3Config, share: ModelShare) -> Slots:
    """Fields of ``M3Weights`` that belong to no layer."""
    vocab, hidden = config.vocab_size, config.hidden_size
    by_token = {"embed": naming.prefix + "embed_tokens.weight"}
    if not config.tie_word_embeddings:
        by_token["lm_head"] = naming.lm_head
    slots = {
        field: Slot((_piece(name, (vocab, hidden), share.vocab),), (share.vocab_rows, hidden))
        for field, name in by_token.items()
    }
    return slots | {"norm": _whole(naming.prefix + "norm.weight", hidden)}


def layer_slots(naming: Naming, config: M3Config, layer: int) -> Slots:
    """Fields of ``LayerWeights`` that every layer has."""
    prefix = _layer(naming, layer)
    hidden = config.hidden_size
    return {
        "input_norm": _whole(prefix + "input_layernorm.weight", hidden),
        "post_attention_norm": _whole(prefix + "post_attention_layernorm.weight", hidden),
    }


def attention_slots(naming: Naming, config: M3Config, layer: int, share: ModelShare) -> Slots:
    """Tensor fields of ``AttentionWeights``; index fields only on sparse layers."""
    prefix = _layer(naming, layer) + "self_attn."
    hidden, dim = config.hidden_size, config.head_dim
    inputs = {
        "q_proj": (config.num_heads, share.q_heads),
        "k_proj": (config.num_kv_heads, share.kv_heads),
        "v_proj": (config.num_kv_heads, share.kv_heads),
    }
    norms = {"q_norm": "q_norm", "k_norm": "k_norm"}
    if config.sparse_layers[layer]:
        index = naming.indexer
        inputs |= {f"{index}q_proj": (config.num_index_heads, share.kv_heads), f"{index}k_proj": (1, range(1))}
        norms |= {"index_q_norm": f"{index}q_norm", "index_k_norm": f"{index}k_norm"}
    slots = {field: _whole(f"{prefix}{name}.weight", dim) for field, name in norms.items()}
    parts = tuple(
        _piece(f"{prefix}{name}.weight", (heads * dim, hidden), _scaled(held, dim))
        for name, (heads, held) in inputs.items()
    )
    slots["inputs"] = _joined(parts, (sum(len(part.taken[0]) for part in parts), hidden))
    columns = _scaled(share.q_heads, dim)
    output = Part(f"{prefix}o_proj.weight", (hidden, config.num_heads * dim), (range(hidden), columns))
    return slots | {"output": _joined((output,), (hidden, len(columns)))}


def dense_mlp_slots(naming: Naming, config: M3Config, layer: int, share: ModelShare) -> Slots:
    prefix = _layer(naming, layer) + "mlp."
    return _mlp_slots(naming, prefix, (config.dense_intermediate_size, config.hidden_size), share.dense_columns)


def shared_expert_slots(naming: Naming, config: M3Config, layer: int, share: ModelShare) -> Slots:
    prefix = f"{_layer(naming, layer)}{naming.moe}shared_experts."
    return _mlp_slots(naming, prefix, (config.shared_intermediate_size, config.hidden_size), share.shared_columns)


def routed_expert_slots(naming: Naming, config: M3Config, layer: int, share: ModelShare) -> Slots:
    """Tensor fields of ``MoeWeights`` but the shared expert."""
    prefix = _layer(naming, layer) + naming.moe
    experts, size, hidden = config.num_experts, config.expert_intermediate_size, config.hidden_size
    columns, held = share.expert_columns, share.experts
    gate_up: list[Part] = []
    down: list[Part] = []
    for expert in held:
        if naming.released:  # w1 is the gate, w3 up, w2 down
            each = f"{prefix}experts.{expert}."
            gate_up += [_piece(f"{each}{half}.weight", (size, hidden), columns) for half in ("w1", "w3")]
            down.append(Part(f"{each}w2.weight", (hidden, size), (range(hidden), columns)))
            continue
        one, fused = range(expert, expert + 1), (experts, 2 * size, hidden)
        for half in (columns, _moved(columns, size)):
            gate_up.append(Part(prefix + "experts.gate_up_proj", fused, (one, half, range(hidden))))
        down.append(Part(prefix + "experts.down_proj", (experts, hidden, size), (one, range(hidden), columns)))
    return {
        "router": _whole(prefix + "gate.weight", experts, hidden),
        "router_bias": _whole(prefix + naming.router_bias, experts),
        "gate_up": _joined(tuple(gate_up), (len(held), 2 * len(columns), hidden)),
        "down": _joined(tuple(down), (len(held), hidden, len(columns))),
    }


def all_slots(naming: Naming, config: M3Config, share: ModelShare) -> Iterator[Slot]:
    """Every weight of one rank."""
    groups = [model_slots(naming, config, share)]
    for layer, moe in enumerate(config.moe_layers):
        groups += [layer_slots(naming, config, layer), attention_slots(naming, config, layer, share)]
        if moe:
            groups.append(shared_expert_slots(naming, config, layer, share))
            groups.append(routed_expert_slots(naming, config, layer, share))
        else:
            groups.append(dense_mlp_slots(naming, config, layer, share))
    return (slot for group in groups for slot in group.values())


def all_parts(naming: Naming, config: M3Config) -> dict[str, Part]:
    """Every tensor that the checkpoint must hold, and no other, by name."""
    return {part.name: part for slot in all_slots(naming, config, model_share(config)) for part in slot.parts}


def _layer(naming: Naming, layer: int) -> str:
    return f"{naming.prefix}layers.{layer}."


def _mlp_slots(naming: Naming, prefix: str, sizes: tuple[int, int], columns: range) -> Slots:
    """Sizes: intermediate, hidden."""
    size, hidden = sizes
    if naming.released:
        halves = tuple(_piece(f"{prefix}{half}_proj.weight", (size, hidden), columns) for half in ("gate", "up"))
    else:
        fused = (prefix + "gate_up_proj.weight", (2 * size, hidden))
        halves = tuple(_piece(*fused, rows) for rows in (columns, _moved(columns, size)))
    down = Part(prefix + "down_proj.weight", (hidden, size), (range(hidden), columns))
    return {
        "gate_up": _joined(halves, (2 * len(columns), hidden)),
        "down": _joined((down,), (hidden, len(columns))),
    }


def _whole(name: str, *shape: int) -> Slot:
    """What every rank has, in float32: norms and the router."""
    return Slot((Part(name, shape, tuple(map(range, shape)), exact=True),), shape)


def _piece(name: str, shape: tuple[int, int], rows: range) -> Part:
    return Part(name, shape, (rows, range(shape[1])))


def _joined(parts: tuple[Part, ...], shape: Shape) -> Slot:
    assert sum(part.num_elements for part in parts) == prod(shape), f"{parts[:1]} do not fill {shape}"
    return Slot(parts, shape)


def _scaled(heads: range, dim: int) -> range:
    """The dims of a run of heads."""
    return range(heads.start * dim, heads.stop * dim)


def _moved(run: range, by: int) -> range:
    return range(run.start + by, run.stop + by)
