"""Random M3-like checkpoints written by transformers, and its own model as the oracle for them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
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
