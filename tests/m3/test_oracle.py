"""Our model, chunked and paged, against transformers' own on random checkpoints, under the equality rule."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from pdkv.m3.model import M3Model, load_model
from pdkv.verify.equality import Verdict, combine, compare_logits, compare_tokens
from tests.checkpoints import Oracle, write_random_checkpoint
from tests.m3.paged_run import PagedRun

NUM_TOKENS = 6

SHAPES: dict[str, dict[str, object]] = {
    "small": {},
    "wide": {
        # Other head counts and sizes, a sparse layer first, MoE everywhere, whole heads rotated, two local blocks.
        "num_hidden_layers": 3,
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "index_n_heads": 2,
        "head_dim": 48,
        "index_head_dim": 48,
        "rotary_dim": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.0},
        "layer_types": ["minimax_m3_sparse", "full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["sparse", "sparse", "sparse"],
        "num_local_experts": 7,
        "num_experts_per_tok": 3,
        "index_topk_blocks": 4,
        "index_local_blocks": 2,
        "routed_scaling_factor": 1.5,
        "swiglu_limit": 2.0,
    },
    "long": {
        # As little as makes 6,000 tokens cheap for the oracle, with M3's head size.
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "index_n_heads": 2,
        "head_dim": 128,
        "index_head_dim": 128,
        "rotary_dim": 64,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
        "mlp_layer_types": ["dense", "sparse"],
        "index_topk_blocks": 3,
    },
}


@dataclass(frozen=True)
class Pair:
    oracle: Oracle
    model: M3Model


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    made = {}
    for seed, (name, overrides) in enumerate(SHAPES.items()):
        directory: Path = tmp_path_factory.mktemp(name)
        write_random_checkpoint(directory, seed, **overrides)
        made[name] = Pair(Oracle(directory), load_model(directory))
    return made


def answer(pair: Pair, length: int, chunk: int, seed: int = 0) -> Verdict:
    """Greedy tokens and the logits that gave them, of a random prompt."""
    case = pair.oracle.case(length, NUM_TOKENS, seed)
    run = PagedRun(pair.model, length + NUM_TOKENS, seed)
    tokens, logits = run.greedy(case.prompt, NUM_TOKENS, chunk)
    verdict = compare_tokens(tokens, case.tokens, case.logits)
    # Behind an excused token both go their own way.
    same = verdict.num_compared
    return combine([verdict, compare_logits(logits[:same].numpy(), case.logits[:same])])


@pytest.mark.parametrize("length", [1, 127, 128, 129, 511, 2048, 2049])
@pytest.mark.parametrize(("shape", "chunk"), [("small", 512), ("wide", 300)])
def test_answers_equal_the_oracles(pairs: dict[str, Pair], shape: str, chunk: int, length: int):
    verdict = answer(pairs[shape], length, chunk)
    print(verdict)  # noqa: T201  shown with -rP, or when it fails
    assert verdict.equal, verdict


@pytest.mark.parametrize(("length", "chunk"), [(3000, 700)])
def test_long_answers_equal_the_oracles(pairs: dict[str, Pair], length: int, chunk: int):
    verdict = answer(pairs["long"], length, chunk)
    print(verdict)  # noqa: T201
    assert verdict.equal, verdict


@pytest.mark.parametrize("shape", ["small", "wide"])
def test_logits_behind_every_prompt_token_equal_the_oracles(pairs: dict[str, Pair], shape: str):
    pair = pairs[shape]
    ids = np.random.default_rng(7).integers(3, pair.oracle.vocab_size, 1500).tolist()
    run = PagedRun(pair.model, len(ids))
    parts = [ids[begin : begin + 400] for begin in range(0, len(ids), 400)]
    ours = torch.cat([run.feed(part, list(range(len(part)))) for part in parts])
    verdict = compare_logits(ours.numpy(), pair.oracle.logits(ids))
    print(verdict)  # noqa: T201
    assert verdict.equal, verdict


def test_each_kind_of_state_moves_the_logits(pairs: dict[str, Pair]):
    """Lost state must show far above the noise between implementations; index keys too, once selection matters."""
    pair = pairs["small"]
    case = pair.oracle.case(2049, 2, 3)
    run = PagedRun(pair.model, 2050)
    run.prefill(case.prompt, 512)
    kept = {(r.name, r.layer): run.arena.view(r.name, r.layer).clone() for r in run.arena.regions()}
    exact = run.feed(case.tokens[:1])[0]
    noise = float((exact - torch.from_numpy(case.logits[1])).abs().max())
    assert noise < 1e-4
    for name, layer in kept:
        view = run.arena.view(name, layer)
        for other, content in kept.items():
            run.arena.view(*other).copy_(content)
        view.zero_()
        run.num_tokens = 2049
        moved = float((run.feed(case.tokens[:1])[0] - exact).abs().max())
        assert moved > 100 * max(noise, 1e-6), (name, layer, moved, noise)


def test_bfloat16_checkpoint_is_computed_in_float32(tmp_path: Path):
    write_random_checkpoint(tmp_path, 4, torch.bfloat16)
    pair = Pair(Oracle(tmp_path), load_model(tmp_path))
    assert pair.model.dtype == torch.bfloat16
    verdict = answer(pair, 600, 512)  # over state stored in float32, so that nothing but the weights is rounded
    assert verdict.equal, verdict
