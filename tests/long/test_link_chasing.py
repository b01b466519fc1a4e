"""Link chasing, at length: long prompts, and every region of every layer and head lost in turn."""

from collections import Counter
from pathlib import Path

import pytest

from pdkv.m3.model import M3Model, load_model
from pdkv.schema import RegionKey
from pdkv.verify.link_chasing import LinkChasingPrompt, make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.state_loss import first_wrong_steps, prefill, region_keys
from pdkv.verify.undivided import complete_with

NUM_STEPS = 64
"""As many as there are nodes: every home of the chain is visited."""

BEYOND_SELECTION = 3072
WITHIN_SELECTION = 512
"""Up to 16 blocks are selected whole, whatever the index keys say."""


@pytest.fixture(scope="module")
def model(link_chasing_model: Path) -> M3Model:
    return load_model(link_chasing_model)


@pytest.mark.parametrize("num_tokens", [3072, 6000])
def test_the_undivided_engine_follows_long_chains(model: M3Model, num_tokens: int) -> None:
    prompt = make_prompt(1, num_tokens)
    answer = complete_with(model, prompt.token_ids, NUM_STEPS)
    assert answer.token_ids == prompt.expected(NUM_STEPS)
    assert min(answer.logprobs) > -1e-4


@pytest.mark.parametrize("num_tokens", [WITHIN_SELECTION, BEYOND_SELECTION])
def test_a_lost_region_breaks_the_chain(model: M3Model, num_tokens: int) -> None:
    """K and V always show; index keys only beyond 16 blocks. That is the disguise of the bug that loses them."""
    prompt = make_prompt(3, num_tokens)
    expected = prompt.expected(NUM_STEPS)
    prefilled = prefill(model, prompt.token_ids)
    assert prefilled.token == expected[0]
    regions = region_keys(prefilled.arena)
    assert Counter(region.name for region in regions) == {"k": 16, "v": 16, "index_k": 3}
    wrong = first_wrong_steps(model, prefilled, expected, [None, *regions])
    assert wrong.pop(None) is None, "nothing lost, nothing wrong"
    for region, step in wrong.items():
        if region.name == "index_k":
            assert (step is None) == (num_tokens == WITHIN_SELECTION), region
        else:
            assert step == _first_step_served_by(prompt, region), region


def test_lost_scales_and_shared_index_keys_break_the_chain(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, index_topk_freq=2)
    model = load_model(tmp_path)
    prompt, stored = make_prompt(3, BEYOND_SELECTION), ("fp8", "fp8")
    expected = prompt.expected(32)
    prefilled = prefill(model, prompt.token_ids, stored=stored)
    regions = region_keys(prefilled.arena)
    assert Counter(region.name for region in regions) == dict.fromkeys(("k", "v", "k_scale", "v_scale"), 16) | {
        "index_k": 2
    }
    lost = [it for it in regions if it.name == "index_k" or (it.name.endswith("scale") and it.head == it.layer % 2)]
    wrong = first_wrong_steps(model, prefilled, expected, [None, *lost], stored=stored)
    assert wrong.pop(None) is None, "nothing lost, nothing wrong"
    for region, step in wrong.items():
        if region.name == "index_k":
            served = {1: (1, 2), 3: (3,)}[region.layer]
            assert prompt.home(step).layer in served, region
        else:
            assert step == _first_step_served_by(prompt, region), region


def _first_step_served_by(prompt: LinkChasingPrompt, region: RegionKey) -> int:
    served = (prompt.home(step) for step in range(1, NUM_STEPS))
    return 1 + [(at.layer, at.kv_head) for at in served].index((region.layer, region.head))
