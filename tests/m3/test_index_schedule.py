"""Layers that reuse a selection: which they are, what they keep, and that they answer as transformers would."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from pdkv.errors import ModelError
from pdkv.m3.config import IndexScheduleOverride, M3Config, kv_layout, load_config, model_fingerprint
from pdkv.m3.model import M3Model, load_model
from pdkv.verify.equality import compare_logits, compare_tokens
from tests.checkpoints import Oracle, write_random_checkpoint
from tests.m3.paged_run import PagedRun

NUM_TOKENS = 4
SPARSE = 6
SHAPE: dict[str, object] = {
    "num_hidden_layers": SPARSE + 1,
    "layer_types": ["full_attention"] + ["minimax_m3_sparse"] * SPARSE,
    "mlp_layer_types": ["dense"] * (SPARSE + 1),
    "hidden_size": 32,
    "dense_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "index_n_heads": 2,
    "head_dim": 16,
    "index_head_dim": 16,
    "rotary_dim": 8,
}
"""One dense layer and six sparse ones, two blocks a query."""

SCHEDULES = {
    "freq 2": (IndexScheduleOverride(topk_freq=2), (2, 4, 6)),
    "freq 4": (IndexScheduleOverride(topk_freq=4), (2, 3, 4, 6)),
    "freq 2 after 2": (IndexScheduleOverride(topk_freq=2, skip_topk_offset=2), (4, 6)),
    "pattern": (IndexScheduleOverride(topk_pattern="FSCSS"), (2, 4, 5)),
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("schedule")
    write_random_checkpoint(directory, 21, **SHAPE)
    return directory


@pytest.fixture(scope="module")
def oracle(checkpoint: Path) -> Oracle:
    return Oracle(checkpoint)


@contextmanager
def reusing(oracle: Oracle, layers: tuple[int, ...]) -> Iterator[None]:
    """transformers' model with what the indexers of ``layers`` select replaced by what the one before them did."""
    last: list[torch.Tensor] = []

    def selected(layer: int) -> Any:
        def hook(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
            if layer in layers:
                return last[-1]
            last.append(output)
            return output

        return hook

    decoder = oracle._model.model.layers
    hooks = [it.self_attn.indexer.register_forward_hook(selected(i)) for i, it in enumerate(decoder) if i > 0]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def config_of(
    tmp_path: Path, checkpoint: Path, override: IndexScheduleOverride | None = None, **fields: Any
) -> M3Config:
    raw = json.loads((checkpoint / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**raw, **fields}))
    return load_config(tmp_path, override)


@pytest.mark.parametrize(
    ("fields", "reused"),
    [
        ({}, ()),
        ({"index_topk_freq": 4}, ()),
        ({"use_index_cache": False, "index_topk_freq": 4, "index_topk_pattern": "FS"}, ()),
        ({"use_index_cache": True}, ()),
        ({"use_index_cache": True, "index_topk_freq": None}, ()),
        ({"use_index_cache": True, "index_topk_freq": 0}, ()),
        ({"use_index_cache": True, "index_topk_freq": 1}, ()),
        ({"use_index_cache": True, "index_topk_freq": 2}, (2, 4, 6)),
        ({"use_index_cache": True, "index_topk_freq": 4}, (2, 3, 4, 6)),
        ({"use_index_cache": True, "index_topk_freq": 99}, (2, 3, 4, 5, 6)),
        ({"use_index_cache": True, "index_topk_freq": 3, "index_skip_topk_offset": 1}, (3, 4, 6)),
        ({"use_index_cache": True, "index_topk_freq": 3, "index_skip_topk_offset": 9}, ()),
        ({"use_index_cache": True, "index_topk_pattern": "FSS"}, (2, 3)),
        ({"use_index_cache": True, "index_topk_pattern": "CCCCCS", "index_topk_freq": 2}, (6,)),
        ({"use_index_cache": True, "index_topk_pattern": "", "index_topk_freq": 5}, (2, 3, 4, 5)),
    ],
)
def test_what_a_config_says(tmp_path: Path, checkpoint: Path, fields: dict[str, Any], reused: tuple[int, ...]):
    config = config_of(tmp_path, checkpoint, **fields)
    assert config.reusing_layers == reused
    assert config.selecting_layers == tuple(layer > 0 and layer not in reused for layer in range(SPARSE + 1))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"index_topk_freq": -1}, "index_topk_freq is -1, cannot be negative"),
        ({"index_topk_freq": 2, "index_skip_topk_offset": -1}, "index_skip_topk_offset is -1"),
        ({"index_topk_freq": 2.5}, "index_topk_freq is 2.5"),
        ({"index_topk_pattern": "SFF"}, "index_topk_pattern begins with S"),
        ({"index_topk_pattern": "FXS"}, "index_topk_pattern has 'X'"),
        ({"index_topk_pattern": "Fs"}, "index_topk_pattern has 's'"),
        ({"index_topk_pattern": "F" * 7}, "index_topk_pattern has 7 letters for 6 sparse layers"),
        ({"index_topk_pattern": [1, 0]}, "index_topk_pattern is [1, 0]"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused_by_name(
    tmp_path: Path, checkpoint: Path, fields: dict[str, Any], named: str
):
    with pytest.raises(ModelError) as caught:
        config_of(tmp_path, checkpoint, use_index_cache=True, **fields)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("override", "reused"),
    [
        (IndexScheduleOverride(), (2, 4, 6)),
        (IndexScheduleOverride(topk_freq=1), ()),
        (IndexScheduleOverride(topk_freq=3), (2, 3, 5, 6)),
        (IndexScheduleOverride(topk_pattern="FFFFFS"), (6,)),
        (IndexScheduleOverride(topk_freq=3, topk_pattern="FFFFFS"), (6,)),
        (IndexScheduleOverride(skip_topk_offset=3), (5,)),
        (IndexScheduleOverride(topk_freq=2, skip_topk_offset=4), (6,)),
    ],
)
def test_what_is_given_when_serving_goes_before_the_config(
    tmp_path: Path, checkpoint: Path, override: IndexScheduleOverride, reused: tuple[int, ...]
):
    config = config_of(tmp_path, checkpoint, override, use_index_cache=True, index_topk_freq=2)
    assert config.reusing_layers == reused


def test_a_schedule_given_when_serving_needs_no_config_and_is_checked_alike(tmp_path: Path, checkpoint: Path):
    assert config_of(tmp_path, checkpoint, IndexScheduleOverride(topk_freq=2)).reusing_layers == (2, 4, 6)
    for override, named in (
        (IndexScheduleOverride(topk_pattern="SF"), "index_topk_pattern, given when serving, begins with S"),
        (
            IndexScheduleOverride(skip_topk_offset=2),
            "index_skip_topk_offset, given when serving, has no effect without index_topk_freq",
        ),
    ):
        with pytest.raises(ModelError, match=named):
            config_of(tmp_path, checkpoint, override)


def test_a_config_made_by_hand_keeps_the_rule(checkpoint: Path):
    config = load_config(checkpoint)
    for layers, named in (((1, 2), "layer 1 is the first sparse one"), ((0,), "not all of them are sparse")):
        with pytest.raises(ModelError, match=named):
            msgspec.structs.replace(config, reusing_layers=layers)


def test_the_schedule_is_in_the_layout_and_in_the_fingerprint(checkpoint: Path):
    whole = load_config(checkpoint)
    half, same = (
        load_config(checkpoint, IndexScheduleOverride(**by)) for by in ({"topk_freq": 2}, {"topk_pattern": "FSFSFS"})
    )
    assert half == same
    assert kv_layout(whole).index_schedule == "all"
    assert kv_layout(half).index_schedule == "layers 1, 3, 5 select"
    assert [spec.layer for spec in kv_layout(half).specs if spec.name == "index_k"] == [1, 3, 5]
    assert model_fingerprint(checkpoint, half) != model_fingerprint(checkpoint, whole)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("chunk", [900, 250])
def test_answers_equal_transformers_with_the_same_reuse(checkpoint: Path, oracle: Oracle, name: str, chunk: int):
    override, layers = SCHEDULES[name]
    model = load_model(checkpoint, schedule=override)
    assert model.config.reusing_layers == layers
    with reusing(oracle, layers):
        case = oracle.case(900, NUM_TOKENS, 5)
    tokens, logits = PagedRun(model, 900 + NUM_TOKENS).greedy(case.prompt, NUM_TOKENS, chunk)
    assert compare_tokens(tokens, case.tokens, case.logits).equal
    verdict = compare_logits(logits.numpy(), case.logits)
    assert verdict.equal, verdict
    plain = oracle.greedy(case.prompt, 1)
    assert np.abs(plain.logits[0] - case.logits[0]).max() > 1e-2, "the schedule makes no difference: nothing was tested"


def test_a_reusing_layer_keeps_no_index_keys_and_a_selecting_ones_matter(checkpoint: Path):
    model = load_model(checkpoint, schedule=IndexScheduleOverride(topk_freq=4))
    run = PagedRun(model, 901)
    ids = torch.randint(3, 320, (901,), generator=torch.Generator().manual_seed(2)).tolist()
    run.prefill(ids[:900], 512)
    kept = [region.layer for region in run.arena.regions() if region.name == "index_k"]
    assert kept == [1, 5]
    exact = run.feed(ids[900:])
    for layer in kept:
        content = run.arena.view("index_k", layer).clone()
        run.arena.view("index_k", layer).zero_()
        run.num_tokens = 900
        moved = float((run.feed(ids[900:]) - exact).abs().max())
        run.arena.view("index_k", layer).copy_(content)
        assert moved > 1e-2, layer


def test_a_reusing_layer_without_a_selection_in_the_step_is_an_error(checkpoint: Path):
    model = load_model(checkpoint, schedule=IndexScheduleOverride(topk_freq=2))
    run = PagedRun(model, 10)
    run.feed([5, 6, 7])
    # As a stage of a pipeline would be cut that begins with layer 2; __post_init__ refuses it, so go around it.
    cut = msgspec.structs.replace(model.config)
    msgspec.structs.force_setattr(cut, "reusing_layers", (1, 2, 4, 6))
    broken = M3Model(cut, model._weights)
    run.model = broken
    with pytest.raises(ModelError, match="layer 1 reuses a selection, and no layer of this step has made one"):
        run.feed([8])


def test_index_weights_of_a_reusing_layer_do_not_matter(checkpoint: Path):
    override = IndexScheduleOverride(topk_freq=2)
    model, other = (load_model(checkpoint, schedule=override) for _ in range(2))
    for layer in (2, 4, 6):
        attention = other._weights.layers[layer].attention
        rows = attention.inputs.shape[0] - 3 * 16
        attention.inputs[rows:] = torch.nan
        attention.index_q_norm.fill_(torch.nan)
    ids = torch.randint(3, 320, (700,), generator=torch.Generator().manual_seed(3)).tolist()
    assert torch.equal(PagedRun(model, 700).feed(ids), PagedRun(other, 700).feed(ids))
