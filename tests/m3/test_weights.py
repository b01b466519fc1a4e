"""Loading checkpoints: whole or in shards, in either dtype, and every misfit named in one error."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pdkv.errors import CheckpointError, ModelError
from pdkv.m3.config import load_config, model_fingerprint
from pdkv.m3.model import load_model
from pdkv.m3.weights import MlpWeights, load_weights
from tests.checkpoints import write_random_checkpoint
from tests.m3.paged_run import PagedRun

PROMPT = list(range(3, 303))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("whole")
    write_random_checkpoint(directory, 3)
    return directory


def copy_with(source: Path, target: Path, **changed: torch.Tensor | None) -> Path:
    """The checkpoint with tensors replaced, added, or taken away (None)."""
    target.mkdir(exist_ok=True)
    tensors = {**load_file(source / "model.safetensors"), **changed}
    save_file({name: t for name, t in tensors.items() if t is not None}, target / "model.safetensors")
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def split(source: Path, target: Path) -> Path:
    """The checkpoint in two shards with an index."""
    target.mkdir(exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for shard, held in shards.items():
        save_file({name: tensors[name] for name in held}, target / shard)
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_shards_are_the_same_model(whole: Path, tmp_path: Path):
    sharded = split(whole, tmp_path / "sharded")
    one, other = (PagedRun(load_model(d), 300).prefill(PROMPT, 300) for d in (whole, sharded))
    assert torch.equal(one, other)
    config = load_config(whole)
    assert model_fingerprint(sharded, config) != model_fingerprint(whole, config)


def test_one_error_lists_every_misfit(whole: Path, tmp_path: Path):
    wrong = copy_with(
        whole,
        tmp_path / "wrong",
        **{
            "model.norm.weight": None,
            "model.layers.2.self_attn.indexer.k_proj.weight": None,
            "model.layers.0.self_attn.indexer.k_proj.weight": torch.zeros(32, 64),
            "model.layers.1.self_attn.q_proj.weight": torch.zeros(64, 64),
            "model.layers.3.mlp.gate.weight": torch.zeros(4, 64, dtype=torch.int32),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(wrong)
    text = str(caught.value)
    assert "5 problems" in text
    assert "missing: model.norm.weight [64]" in text
    assert "missing: model.layers.2.self_attn.indexer.k_proj.weight [32, 64]" in text
    assert "extra: model.layers.0.self_attn.indexer.k_proj.weight" in text
    assert "mis-shaped: model.layers.1.self_attn.q_proj.weight is [64, 64], the config asks for [256, 64]" in text
    assert "mis-typed: model.layers.3.mlp.gate.weight is I32" in text


def test_damaged_or_absent_files_are_named(whole: Path, tmp_path: Path):
    config = (whole / "config.json").read_bytes()
    (tmp_path / "config.json").write_bytes(config)
    with pytest.raises(CheckpointError, match="holds neither"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((whole / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_model(tmp_path)
    with pytest.raises(CheckpointError, match="not a whole safetensors file"):
        model_fingerprint(tmp_path, load_config(tmp_path))
    sharded = split(whole, tmp_path / "sharded")
    (sharded / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: model-00002-of-00002\.safetensors"):
        load_model(sharded)


def test_tied_embeddings_have_no_head_of_their_own(whole: Path, tmp_path: Path):
    tied = copy_with(whole, tmp_path / "tied", **{"lm_head.weight": None})
    raw = json.loads((tied / "config.json").read_text())
    (tied / "config.json").write_text(json.dumps({**raw, "tie_word_embeddings": True}))
    weights = load_weights(tied, load_config(tied), "cpu", torch.float32)
    assert weights.lm_head is weights.embed


def test_bfloat16_rounds_matrices_and_keeps_norms_and_router(whole: Path):
    exact, rounded = load_model(whole), load_model(whole, dtype="bfloat16")
    assert (exact.dtype, rounded.dtype) == (torch.float32, torch.bfloat16)
    assert rounded.config.dtype == "bfloat16"
    config = rounded.config
    fine = load_weights(whole, exact.config, "cpu", torch.float32)
    coarse = load_weights(whole, config, "cpu", torch.float32)
    layer, fine_layer = coarse.layers[1], fine.layers[1]
    assert torch.equal(layer.attention.inputs, fine_layer.attention.inputs.bfloat16().float())
    assert torch.equal(layer.attention.q_norm, fine_layer.attention.q_norm)
    assert not isinstance(layer.mlp, MlpWeights)
    assert not isinstance(fine_layer.mlp, MlpWeights)
    assert torch.equal(layer.mlp.router, fine_layer.mlp.router)
    assert layer.attention.inputs.dtype == torch.float32


def test_unknown_dtype_is_refused(whole: Path):
    with pytest.raises(ModelError, match="dtype 'int8' is not one of auto, float32, bfloat16"):
        load_model(whole, dtype="int8")
