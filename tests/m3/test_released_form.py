"""Weights in released names: the same model as in transformers' names, and every misfit named in the file's own."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.minimax_m3_vl import MiniMaxM3SparseForConditionalGeneration

from pdkv.errors import CheckpointError
from pdkv.m3 import tensor_names
from pdkv.m3.config import load_config, model_fingerprint
from pdkv.m3.model import load_model
from pdkv.m3.weights import MoeWeights, load_weights
from tests.checkpoints import write_random_checkpoint, write_released_form, write_shards
from tests.m3.paged_run import PagedRun
from tests.m3.test_config import released
from tests.m3.weight_tensors import tensors

PROMPT = list(range(3, 303)) * 2
"""Beyond the two blocks that a query selects."""
MOE = "language_model.model.layers.2.block_sparse_moe."
ATTENTION = "language_model.model.layers.1.self_attn."


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("plain")
    write_random_checkpoint(directory, 3, eos_token_id=[2, 5])
    return directory


@pytest.fixture(scope="module")
def nested(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("nested")
    write_released_form(plain, directory)
    return directory


def logits(directory: Path) -> torch.Tensor:
    return PagedRun(load_model(directory), len(PROMPT)).prefill(PROMPT, 300)


def all_tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: t for path in directory.glob("*.safetensors") for name, t in load_file(path).items()}


def copy_with(source: Path, target: Path, shards: int = 1, **changed: torch.Tensor | None) -> Path:
    """The checkpoint with tensors replaced, added, or taken away (None)."""
    target.mkdir()
    tensors = {**all_tensors(source), **changed}
    write_shards(target, {name: t for name, t in tensors.items() if t is not None}, shards)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_both_forms_give_the_same_logits(plain: Path, nested: Path, tmp_path: Path):
    expected = logits(plain)
    write_released_form(plain, tmp_path / "text", text_only=True, shards=2)
    write_released_form(plain, tmp_path / "blind", with_vision=False, shards=1)
    for directory in (nested, tmp_path / "text", tmp_path / "blind"):
        assert load_config(directory) == load_config(plain)
        assert torch.equal(logits(directory), expected)


def test_transformers_takes_the_rewritten_checkpoint_for_the_same_model(nested: Path):
    """So that the rewriter and the loader cannot share one misunderstanding."""
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(
        nested, attn_implementation="eager", dtype=torch.float32
    )
    with torch.no_grad():
        theirs = model.eval()(torch.tensor([PROMPT]), logits_to_keep=1).logits[0, -1]
    torch.testing.assert_close(logits(nested), theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("original_names", [True, False])
def test_what_transformers_multimodal_class_writes(nested: Path, tmp_path: Path, original_names: bool):
    """Released names beside a nested config in transformers' words, or the names that its modules have."""
    model = MiniMaxM3SparseForConditionalGeneration.from_pretrained(nested, config=AutoConfig.from_pretrained(nested))
    model.save_pretrained(tmp_path, max_shard_size="200KB", save_original_format=original_names)
    assert torch.equal(logits(tmp_path), logits(nested))


def test_names_of_the_released_checkpoint():
    """Its index lists 23,416 tensors, 523 of them the vision tower's and the projector's."""
    parts = {
        naming.title: {name: part.shape for name, part in tensor_names.all_parts(naming, released()).items()}
        for naming in tensor_names.NAMINGS
    }
    names = parts["the release"]
    assert len(names) == 23_416 - 523
    assert names["language_model.lm_head.weight"] == names["language_model.model.embed_tokens.weight"] == (200064, 6144)
    layer = "language_model.model.layers.59."
    assert names[f"{layer}self_attn.q_proj.weight"] == (8192, 6144)
    assert names[f"{layer}self_attn.index_q_proj.weight"] == (512, 6144)
    assert names[f"{layer}self_attn.index_k_proj.weight"] == (128, 6144)
    assert names[f"{layer}self_attn.index_k_norm.weight"] == (128,)
    assert names[f"{layer}block_sparse_moe.experts.127.w1.weight"] == (3072, 6144)
    assert names[f"{layer}block_sparse_moe.experts.127.w2.weight"] == (6144, 3072)
    assert names[f"{layer}block_sparse_moe.shared_experts.up_proj.weight"] == (3072, 6144)
    assert names[f"{layer}block_sparse_moe.e_score_correction_bias"] == (128,)
    assert names["language_model.model.layers.2.mlp.gate_proj.weight"] == (12288, 6144)
    alone = {name.removeprefix("language_model.") for name in names}
    assert parts["the release's text model alone"].keys() == alone


def test_names_that_end_alike_are_not_mixed_up(tmp_path: Path):
    """As many q heads as index heads, so that every shape would fit: q_proj ends index_q_proj, k_norm index_k_norm."""
    write_random_checkpoint(tmp_path / "plain", 5, num_attention_heads=4, num_key_value_heads=4)
    write_released_form(tmp_path / "plain", tmp_path / "released")
    tensors = all_tensors(tmp_path / "released")
    weights = load_weights(tmp_path / "released", load_config(tmp_path / "released"), "cpu", torch.float32)
    attention = weights.layers[1].attention
    parts = [tensors[f"{ATTENTION}{name}_proj.weight"] for name in ("q", "k", "v", "index_q", "index_k")]
    assert torch.equal(attention.inputs, torch.cat(parts))
    for name in ("q_norm", "k_norm", "index_q_norm", "index_k_norm"):
        assert torch.equal(getattr(attention, name), tensors[f"{ATTENTION}{name}.weight"])
    moe = weights.layers[2].mlp
    assert isinstance(moe, MoeWeights)
    assert torch.equal(moe.gate_up[3, :48], tensors[f"{MOE}experts.3.w1.weight"])
    assert torch.equal(moe.gate_up[3, 48:], tensors[f"{MOE}experts.3.w3.weight"])
    assert torch.equal(moe.down[3], tensors[f"{MOE}experts.3.w2.weight"])
    assert torch.equal(moe.shared.gate_up[40:], tensors[f"{MOE}shared_experts.up_proj.weight"])
    assert torch.equal(moe.router_bias, tensors[f"{MOE}e_score_correction_bias"])


@pytest.mark.parametrize("gone", ["q_proj", "index_q_proj", "k_norm", "index_k_norm"])
def test_a_tensor_does_not_stand_in_for_one_whose_name_it_ends(nested: Path, tmp_path: Path, gone: str):
    wrong = copy_with(nested, tmp_path / "wrong", **{f"{ATTENTION}{gone}.weight": None})
    with pytest.raises(CheckpointError) as caught:
        load_model(wrong)
    assert "1 problems" in str(caught.value)
    assert f"missing: {ATTENTION}{gone}.weight" in str(caught.value)


def test_one_error_lists_every_misfit_in_released_names(nested: Path, tmp_path: Path):
    wrong = copy_with(
        nested,
        tmp_path / "wrong",
        **{
            "language_model.lm_head.weight": None,
            f"{MOE}experts.3.w2.weight": None,
            f"{MOE}experts.4.w2.weight": torch.zeros(64, 48),
            f"{MOE}experts.0.w1.weight": torch.zeros(64, 48),
            f"{MOE}gate.weight": torch.zeros(4, 64, dtype=torch.uint8),
            f"{ATTENTION}index_v_proj.weight": torch.zeros(32, 64),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(wrong)
    text = str(caught.value)
    assert "6 problems (expected are the names of the release)" in text
    assert "missing: language_model.lm_head.weight [320, 64]" in text
    assert f"missing: {MOE}experts.3.w2.weight [64, 48]" in text
    assert f"extra: {MOE}experts.4.w2.weight" in text
    assert f"mis-shaped: {MOE}experts.0.w1.weight is [64, 48], the config asks for [48, 64]" in text
    assert f"mis-typed: {MOE}gate.weight is U8" in text
    assert f"extra: {ATTENTION}index_v_proj.weight" in text


def test_what_is_read_and_what_is_passed_over_is_said_once(
    nested: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    drafting = {
        "language_model.model.mtp.layers.0.eh_proj.weight": torch.zeros(64, 128),
        "model.mtp.layers.0.enorm.weight": torch.zeros(64),
    }
    directory = copy_with(nested, tmp_path / "drafting", **drafting)
    vision = [t for name, t in all_tensors(nested).items() if not name.startswith("language_model.")]
    with caplog.at_level(logging.INFO, "pdkv.m3"):
        weights = load_weights(directory, load_config(directory), "cpu", torch.float32)
    assert [record.getMessage() for record in caplog.records] == [
        "101 tensors in 1 files, in the names of the release",
        f"skipped 2 tensors of drafting (MTP), {(64 * 128 + 64) * 4} bytes",
        f"skipped {len(vision)} tensors of the vision tower, {sum(t.nbytes for t in vision)} bytes",
        f"rank 0 of 1 holds {sum(t.nbytes for t in tensors(weights))} bytes of weights, matrices in float32",
    ]


def test_shards_that_are_gone_or_cut_short(plain: Path, tmp_path: Path):
    write_released_form(plain, tmp_path, shards=4)
    shards = sorted(tmp_path.glob("*.safetensors"))
    for shard in shards[1:3]:
        shard.write_bytes(shard.read_bytes()[:-10])
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    for shard in shards[1:3]:
        assert f"{shard} cannot be read as safetensors, is it cut short?" in str(caught.value)
    for shard in shards[2:]:
        shard.unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-00003-of-00004\.\w+, model-00004-of-00004\."):
        load_model(tmp_path)


def test_an_index_that_does_not_fit_its_shards(plain: Path, tmp_path: Path):
    write_released_form(plain, tmp_path, shards=2)
    one, two = sorted(tmp_path.glob("*.safetensors"))
    norm, bias = "language_model.model.norm.weight", "multi_modal_projector.linear_1.bias"
    held = {path: load_file(path) for path in (one, two)}
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    moved = next(name for name, file in index.items() if file == one.name and name not in (norm, bias))
    lost = {name: tensor for name, tensor in held[one].items() if name not in (norm, bias)}
    kept = {name: tensor for name, tensor in held[two].items() if name not in (norm, bias)}
    lost.pop(moved)
    kept |= {moved: held[one][moved], "vision_tower.spare": torch.zeros(1)}
    twice = next(iter(lost))
    save_file(lost, one)
    save_file({**kept, twice: lost[twice]}, two)
    with pytest.raises(CheckpointError) as caught:
        load_model(tmp_path)
    text = str(caught.value)
    assert f"missing: {norm} [64] (the index says it is in {index[norm]}, which does not hold it)" in text
    assert f"missing: {bias} (the index says it is in {index[bias]}, which does not hold it)" in text
    assert f"misplaced: {moved} is in {two.name}, the index says {one.name}" in text
    assert f"twice: {twice} is in {one.name} and in {two.name}" in text
    assert f"unlisted: vision_tower.spare is in {two.name}, not in the index" in text


def test_an_index_cannot_reach_outside_its_directory(plain: Path, tmp_path: Path):
    write_released_form(plain, tmp_path, shards=2)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("model-00001", "../model-00001"))
    with pytest.raises(CheckpointError, match="outside its directory"):
        load_model(tmp_path)


def test_the_fingerprint_is_of_the_files_that_were_read(plain: Path, nested: Path, tmp_path: Path):
    """Workers that read different files are not paired, though the model is the same."""
    write_released_form(plain, tmp_path)
    config = load_config(nested)
    assert model_fingerprint(tmp_path, config) == model_fingerprint(nested, config)
    assert model_fingerprint(nested, config) != model_fingerprint(plain, load_config(plain))
