"""The checkpoint that chases links: every weight written down, in the form and under the names of transformers.

The residual stream has one dim a fact: Q_n "which node follows n?", S_n "a link from n", T_n "a link to n", O_n "the
answer is n", F "filler". Each layer's query head asks for its own two nodes with a one-hot code in the dims that
are not rotated, finds the link whose key carries that code, and copies its target to O, which only lm_head reads. A
head that does not serve the node attends to a *sink* whose values are zero. Index keys carry the same codes.

With an index schedule, a layer that selects for others finds their nodes too: each layer that it serves has index codes
of its own.
"""

import json
from math import sqrt
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from pdkv.m3.config_fields import Fields
from pdkv.m3.index_schedule import IndexScheduleOverride, reusing_layers
from pdkv.verify.link_chasing import (
    BLOCK_SIZE,
    BOS,
    EOS,
    FIRST_LINK,
    FIRST_NODE,
    NUM_HEADS,
    NUM_KV_HEADS,
    NUM_LAYERS,
    NUM_NODES,
    VOCAB_SIZE,
    home,
    vocabulary,
)

Weights = dict[str, npt.NDArray[np.float32]]

HIDDEN_SIZE = 320
HEAD_DIM = 128
ROTARY_FACTOR = 0.5
TOPK_BLOCKS = 16
NUM_EXPERTS = 4
INTERMEDIATE_SIZE = 32
MAX_POSITIONS = 131_072
NUM_DENSE_LAYERS = 1

# Residual stream: 64 dims each of Q, S, T, O, then F; the rest stays zero.
_Q, _S, _T, _O = (NUM_NODES * part for part in range(4))
_F = NUM_NODES * 4

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- for message in messages %}
{{ " " + message.content }}
{%- endfor %}
"""
"""All messages behind one another, whoever said them: links and questions are words, and no word marks a speaker."""

_SPARSE = tuple(layer >= NUM_DENSE_LAYERS for layer in range(NUM_LAYERS))
_FIRST_CODE = int(HEAD_DIM * ROTARY_FACTOR)
_SINK = HEAD_DIM - 1


def write_checkpoint(directory: Path, index_topk_freq: int = 1) -> None:
    """Write config.json, model.safetensors, tokenizer.json and tokenizer_config.json, the same bytes every time.

    Creates the directory. ``index_topk_freq``: every so many-th sparse layer selects blocks, for those up to the next
    one too.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_file(weights(index_topk_freq), directory / "model.safetensors", metadata={"format": "pt"})
    _write_json(directory / "config.json", config(index_topk_freq))
    _write_json(directory / "tokenizer.json", _tokenizer())
    _write_json(directory / "tokenizer_config.json", _tokenizer_config())


def served_layers(index_topk_freq: int = 1) -> dict[int, tuple[int, ...]]:
    """For each layer that selects: the layers whose nodes its selection must find, itself the first."""
    schedule = IndexScheduleOverride(topk_freq=index_topk_freq)
    reusing = reusing_layers(Fields({}), _SPARSE, schedule)
    served: dict[int, tuple[int, ...]] = {}
    for layer in (layer for layer, sparse in enumerate(_SPARSE) if sparse):
        last = max(served, default=layer) if layer in reusing else layer
        served[last] = (*served.get(last, ()), layer)
    return served


def config(index_topk_freq: int = 1) -> dict[str, object]:
    """What ``MiniMaxM3VLTextConfig.save_pretrained`` writes for this model."""
    schedule = {"index_topk_freq": index_topk_freq, "use_index_cache": True} if index_topk_freq > 1 else {}
    return {
        **schedule,
        "architectures": ["MiniMaxM3VLForCausalLM"],
        "bos_token_id": BOS,
        "dense_intermediate_size": INTERMEDIATE_SIZE,
        "dtype": "float32",
        "eos_token_id": EOS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": HIDDEN_SIZE,
        "index_block_size": BLOCK_SIZE,
        "index_head_dim": HEAD_DIM,
        "index_local_blocks": 1,
        "index_n_heads": NUM_KV_HEADS,
        "index_topk_blocks": TOPK_BLOCKS,
        "intermediate_size": INTERMEDIATE_SIZE,
        "layer_types": ["minimax_m3_sparse" if it else "full_attention" for it in _SPARSE],
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_layer_types": ["sparse" if it else "dense" for it in _SPARSE],
        "model_type": "minimax_m3_vl_text",
        "num_attention_heads": NUM_HEADS,
        "num_experts_per_tok": 2,
        "num_hidden_layers": NUM_LAYERS,
        "num_key_value_heads": NUM_KV_HEADS,
        "num_local_experts": NUM_EXPERTS,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"partial_rotary_factor": ROTARY_FACTOR, "rope_theta": 5e6, "rope_type": "default"},
        "rotary_dim": int(HEAD_DIM * ROTARY_FACTOR),
        "routed_scaling_factor": 2.0,
        "shared_intermediate_size": INTERMEDIATE_SIZE,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "vocab_size": VOCAB_SIZE,
    }


def weights(index_topk_freq: int = 1) -> Weights:
    """All tensors by transformers' names, float32."""
    served = served_layers(index_topk_freq)
    tensors: Weights = {
        "model.embed_tokens.weight": _embedding(),
        "model.norm.weight": _zeros(HIDDEN_SIZE),
        "lm_head.weight": _lm_head(),
    }
    for layer in range(NUM_LAYERS):
        named = {**_attention(layer), **(_moe() if layer >= NUM_DENSE_LAYERS else _mlp("mlp"))}
        if layer >= NUM_DENSE_LAYERS:
            named.update(_indexer(served.get(layer, (layer,))))
        named["input_layernorm.weight"] = _zeros(HIDDEN_SIZE)
        named["post_attention_layernorm.weight"] = _zeros(HIDDEN_SIZE)
        tensors.update({f"model.layers.{layer}.{name}": tensor for name, tensor in named.items()})
    return tensors


def _embedding() -> npt.NDArray[np.float32]:  # [vocab, hidden]
    table = _zeros(VOCAB_SIZE, HIDDEN_SIZE)
    table[BOS:FIRST_NODE, _F] = 1  # bos, eos and fillers; <lost> stays zero
    for node in range(NUM_NODES):
        table[FIRST_NODE + node, _Q + node] = 1
        for target in range(NUM_NODES):
            table[FIRST_LINK + NUM_NODES * node + target, [_S + node, _T + target]] = 1
    return table


def _lm_head() -> npt.NDArray[np.float32]:  # [vocab, hidden]
    """``<lost>`` wins when no answer reaches an eighth of a full one."""
    table = _zeros(VOCAB_SIZE, HIDDEN_SIZE)
    table[0, _Q : _Q + NUM_NODES] = 0.25
    for node in range(NUM_NODES):
        table[FIRST_NODE + node, _O + node] = 2
    return table


def _attention(layer: int) -> Weights:
    q = _zeros(NUM_HEADS, HEAD_DIM, HIDDEN_SIZE)
    k = _zeros(NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE)
    v = _zeros(NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE)
    o = _zeros(HIDDEN_SIZE, NUM_HEADS, HEAD_DIM)
    q[:, _SINK, _Q : _Q + NUM_NODES] = 1
    q[:, _SINK, _S : _S + NUM_NODES] = 1
    q[:, _SINK, _F] = 1
    k[:, _SINK, _Q : _Q + NUM_NODES] = 1
    k[:, _SINK, _F] = 1
    for node in _nodes_of(layer):
        at = home(node)
        q[at.q_head, _SINK, _Q + node] = 0
        q[at.q_head, _code(node), _Q + node] = 1
        k[at.kv_head, _code(node), _S + node] = 1
    for head in range(NUM_HEADS):
        kv_head = head * NUM_KV_HEADS // NUM_HEADS
        for node in range(NUM_NODES):
            # A shift of its own for each layer and kv head: swapped V heads must show.
            dim = (node + 4 * (NUM_KV_HEADS * layer + kv_head)) % HEAD_DIM
            v[kv_head, dim, _T + node] = sqrt(2 / HIDDEN_SIZE)  # a link's value is then 1
            o[_O + node, head, dim] = 1
    return {
        "self_attn.q_proj.weight": q.reshape(-1, HIDDEN_SIZE),
        "self_attn.k_proj.weight": k.reshape(-1, HIDDEN_SIZE),
        "self_attn.v_proj.weight": v.reshape(-1, HIDDEN_SIZE),
        "self_attn.o_proj.weight": o.reshape(HIDDEN_SIZE, -1),
        "self_attn.q_norm.weight": np.ones(HEAD_DIM, np.float32),  # Gemma norm: gain 2
        "self_attn.k_norm.weight": _zeros(HEAD_DIM),
    }


def _indexer(served: tuple[int, ...]) -> Weights:
    """Of a layer that selects for these layers. One that reuses has what would serve itself, and nobody looks."""
    q = _zeros(NUM_KV_HEADS, HEAD_DIM, HIDDEN_SIZE)
    k = _zeros(HEAD_DIM, HIDDEN_SIZE)
    for number, layer in enumerate(served):
        for node in _nodes_of(layer):
            code = _code(node) + number * NUM_NODES // NUM_LAYERS
            q[home(node).kv_head, code, _Q + node] = 1
            k[code, _S + node] = 1
    return {
        "self_attn.indexer.q_proj.weight": q.reshape(-1, HIDDEN_SIZE),
        "self_attn.indexer.k_proj.weight": k,
        "self_attn.indexer.q_norm.weight": _zeros(HEAD_DIM),
        "self_attn.indexer.k_norm.weight": _zeros(HEAD_DIM),
    }


def _mlp(prefix: str) -> Weights:
    return {
        f"{prefix}.gate_up_proj.weight": _zeros(2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        f"{prefix}.down_proj.weight": _zeros(HIDDEN_SIZE, INTERMEDIATE_SIZE),
    }


def _moe() -> Weights:
    return {
        "mlp.gate.weight": _zeros(NUM_EXPERTS, HIDDEN_SIZE),
        "mlp.gate.e_score_correction_bias": _zeros(NUM_EXPERTS),
        "mlp.experts.gate_up_proj": _zeros(NUM_EXPERTS, 2 * INTERMEDIATE_SIZE, HIDDEN_SIZE),
        "mlp.experts.down_proj": _zeros(NUM_EXPERTS, HIDDEN_SIZE, INTERMEDIATE_SIZE),
        **_mlp("mlp.shared_experts"),
    }


def _nodes_of(layer: int) -> list[int]:
    return [node for node in range(NUM_NODES) if home(node).layer == layer]


def _code(node: int) -> int:
    """The head dim that stands for a node among those of its layer."""
    return _FIRST_CODE + node // NUM_LAYERS


def _zeros(*shape: int) -> npt.NDArray[np.float32]:
    return np.zeros(shape, np.float32)


def _tokenizer() -> dict[str, object]:
    """A tokenizers file: one token a word, words separated by white space, unknown ones ``<lost>``."""
    words = vocabulary()
    ids = {word: token for token, word in enumerate(words)}
    special = [
        {
            "id": token,
            "content": words[token],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for token in (BOS, EOS)
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": ids,
            "unk_token": words[0],
        },
    }


def _tokenizer_config() -> dict[str, object]:
    words = vocabulary()
    return {
        "bos_token": words[BOS],
        "chat_template": CHAT_TEMPLATE,
        "eos_token": words[EOS],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def _write_json(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
