"""The text model's numbers, complete and checked: what everything downstream of ``config.json`` reads."""

import msgspec

from pdkv.errors import ModelError
from pdkv.m3.config_support import BLOCK_SIZE

_DTYPES = ("float32", "bfloat16", "float16")
_QUANTISATIONS = ("none", "mxfp8")


class M3Config(msgspec.Struct, frozen=True, kw_only=True):
    """The text model, complete and checked; nothing downstream reads ``config.json`` again."""

    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rotary_dim: int
    """Leading dims of each head that are rotated; the rest passes through."""

    dense_intermediate_size: int
    expert_intermediate_size: int
    shared_intermediate_size: int
    num_experts: int
    experts_per_token: int
    routed_scaling_factor: float
    swiglu_alpha: float = 1.702
    swiglu_limit: float = 7.0
    swiglu_beta: float = 1.0

    moe_layers: tuple[bool, ...]
    """For each layer: mixture of experts (true) or dense MLP."""
    sparse_layers: tuple[bool, ...]
    """For each layer: attention to selected blocks (true) or to all."""
    num_index_heads: int
    index_dim: int
    topk_blocks: int
    block_size: int = BLOCK_SIZE
    init_blocks: int = 0
    local_blocks: int = 1
    reusing_layers: tuple[int, ...] = ()
    """Sparse layers (global ids) that select nothing and attend to the blocks that the last one before them selected.
    They keep no index keys."""

    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    tie_word_embeddings: bool = False
    dtype: str = "float32"
    """What the checkpoint's weights are stored in, and K/V and index keys unless told otherwise."""
    quantisation: str = "none"
    """mxfp8: of the weights, those stored as e4m3 have a power of two for each 32 elements beside them."""

    @property
    def selecting_layers(self) -> tuple[bool, ...]:
        """For each layer: it scores blocks and writes index keys."""
        return tuple(sparse and layer not in self.reusing_layers for layer, sparse in enumerate(self.sparse_layers))

    def __post_init__(self) -> None:
        problems = [text for broken, text in _rules(self) if broken]
        if problems:
            raise ModelError("the model config cannot be served: " + "; ".join(problems))


def _rules(c: M3Config) -> list[tuple[bool, str]]:
    """What must hold between fields, as (broken, what to say)."""
    rules = [
        (min(c.num_layers, c.hidden_size, c.num_kv_heads, c.head_dim, c.vocab_size) < 1, "sizes must be positive"),
        (
            c.num_heads % max(c.num_kv_heads, 1) != 0,
            f"{c.num_heads} q heads are no multiple of {c.num_kv_heads} kv heads",
        ),
        (len(c.moe_layers) != c.num_layers, f"{len(c.moe_layers)} MLP kinds for {c.num_layers} layers"),
        (len(c.sparse_layers) != c.num_layers, f"{len(c.sparse_layers)} attention kinds for {c.num_layers} layers"),
        (c.block_size != BLOCK_SIZE, f"block size is {c.block_size}, only {BLOCK_SIZE} is implemented"),
        (
            not 0 < c.rotary_dim <= c.head_dim or c.rotary_dim % 2 != 0,
            f"{c.rotary_dim} rotated dims of {c.head_dim} (must be even, at least 2 and at most the head)",
        ),
        (
            any(not 0 <= i < len(c.sparse_layers) or not c.sparse_layers[i] for i in c.reusing_layers),
            f"layers {c.reusing_layers} are to reuse a selection; not all of them are sparse",
        ),
        (c.dtype not in _DTYPES, f"dtype {c.dtype} is not one of {', '.join(_DTYPES)}"),
        (
            c.quantisation not in _QUANTISATIONS,
            f"quantisation {c.quantisation} is not one of {', '.join(_QUANTISATIONS)}",
        ),
    ]
    if any(c.moe_layers):
        rules.append(
            (
                not 0 < c.experts_per_token <= c.num_experts,
                f"{c.experts_per_token} experts per token of {c.num_experts} experts",
            )
        )
    if any(c.sparse_layers):
        first = c.sparse_layers.index(True)
        rules += [
            (
                c.num_index_heads != c.num_kv_heads,
                f"{c.num_index_heads} index heads for {c.num_kv_heads} kv heads (one selection per kv head is needed)",
            ),
            (c.index_dim != c.head_dim, f"index dim {c.index_dim} differs from head dim {c.head_dim}"),
            (min(c.init_blocks, c.local_blocks) < 0, "init and local blocks cannot be negative"),
            (
                c.topk_blocks < max(1, c.init_blocks + c.local_blocks),
                f"top-k of {c.topk_blocks} blocks cannot hold {c.init_blocks} init and {c.local_blocks} local blocks",
            ),
            (first in c.reusing_layers, f"layer {first} is the first sparse one and has no selection to reuse"),
        ]
    return rules
