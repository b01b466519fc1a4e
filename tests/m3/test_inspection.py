"""``inspect_checkpoint``: whole and broken directories, and the bytes of the released model as they are on record."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from pdkv.errors import ModelError
from pdkv.m3.config import load_config
from pdkv.m3.inspection import Inspection, InspectionOptions, RankWeights, Tally, inspect_checkpoint
from pdkv.m3.sharding import model_share
from pdkv.m3.weights import load_weights
from tests.checkpoints import SMALL, released_config, write_random_checkpoint, write_released_form, write_shards
from tests.m3.mxfp8_checkpoint import change_config, write_mxfp8
from tests.m3.test_released_form import all_tensors
from tests.m3.weight_tensors import tensors

M3 = {
    "vocab_size": 200064, "hidden_size": 6144, "num_hidden_layers": 60, "num_attention_heads": 64,
    "num_key_value_heads": 4, "head_dim": 128, "rotary_dim": 64, "intermediate_size": 3072,
    "dense_intermediate_size": 12288, "shared_intermediate_size": 3072, "num_local_experts": 128,
    "num_experts_per_tok": 4, "index_n_heads": 4, "index_head_dim": 128, "index_topk_blocks": 16,
    "layer_types": ["full_attention"] * 3 + ["minimax_m3_sparse"] * 57,
    "mlp_layer_types": ["dense"] * 3 + ["sparse"] * 57,
}  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    write_random_checkpoint(directory, 41)
    return directory


@pytest.fixture
def released(source: Path, tmp_path: Path) -> Path:
    write_released_form(source, tmp_path / "released")
    return tmp_path / "released"


def inspect(directory: Path, **options: object) -> Inspection:
    return inspect_checkpoint(directory, msgspec.convert(options, InspectionOptions))


def test_a_whole_checkpoint(released: Path):
    found = inspect(released, tp_size=2)
    assert (found.fits, found.problems) == (True, ())
    assert (found.naming, found.quantisation, found.dtype) == ("the release", "none", "float32")
    assert (found.num_files, found.num_tensors) == (3, 101)
    held = {name: t for name, t in all_tensors(released).items() if name.startswith("language_model.")}
    assert found.dtypes == (Tally("F32", 101, sum(t.nbytes for t in held.values())),)
    assert [t.name for t in found.skipped] == ["the vision tower"]
    assert found.layers.sparse_attention == found.layers.experts == (1, 2, 3)
    assert found.layers.full_attention == found.layers.dense_mlp == (0,)
    config = load_config(released)
    for told in found.weights:
        weights = load_weights(released, config, "cpu", torch.float32, model_share(config, told.rank, 2))
        assert told.float32_bytes == sum(t.nbytes for t in tensors(weights))


def test_a_quantised_one_is_counted_as_it_is_stored(source: Path, tmp_path: Path):
    write_mxfp8(source, tmp_path / "mxfp8", tmp_path / "oracle")
    change_config(tmp_path / "mxfp8", torch_dtype="bfloat16")
    found = inspect(tmp_path / "mxfp8")
    assert found.fits, found.problems
    assert found.quantisation == "mxfp8"
    assert {t.name: t.num_tensors for t in found.dtypes} == {"BF16": 1, "F32": 31, "F8_E4M3": 69, "U8": 69}
    whole = found.weights[0]
    assert whole.native_bytes < 0.6 * whole.float32_bytes


def test_every_problem_is_told_and_the_rest_all_the_same(released: Path):
    layer = "language_model.model.layers.1."
    held = all_tensors(released)
    del held[f"{layer}self_attn.index_k_proj.weight"]
    held[f"{layer}self_attn.q_proj.weight"] = torch.zeros(8, 64)
    held[f"{layer}self_attn.bias"] = torch.zeros(1)
    held["language_model.model.norm.weight"] = torch.zeros(64, dtype=torch.int64)
    write_shards(released, held, 3)
    found = inspect(released)
    assert not found.fits
    assert found.problems == (
        f"missing: {layer}self_attn.index_k_proj.weight [32, 64]",
        f"extra: {layer}self_attn.bias",
        f"mis-shaped: {layer}self_attn.q_proj.weight is [8, 64], the config asks for [256, 64]",
        "mis-typed: language_model.model.norm.weight is I64, served are BF16, F16, F32",
    )
    assert found.weights[0].rank == 0


def test_files_that_are_absent_or_damaged(released: Path):
    first, second, third = sorted(released.glob("*.safetensors"))
    index = json.loads((released / "model.safetensors.index.json").read_text())["weight_map"]
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    found = inspect(released)
    assert not found.fits
    assert found.naming == "the release"
    assert found.absent_files == (first.name,)
    assert found.damaged_files.keys() == {second.name}
    assert found.num_files == 2
    lost = [name for name, file in index.items() if file != third.name]
    assert len(found.problems) == len(lost)
    missing = {problem.split()[1]: problem for problem in found.problems if problem.startswith("missing: ")}
    assert missing.keys() == set(lost)
    for name, problem in missing.items():
        reason = "is not there" if index[name] == first.name else "cannot be read"
        assert problem.endswith(f"(the index says it is in {index[name]}, which {reason})")


@pytest.mark.parametrize("every", [False, True])
def test_no_weights_at_all(released: Path, every: bool):
    """The config alone, or with an index whose shards are all still to come."""
    for path in released.glob("*.safetensors"):
        path.unlink()
    if not every:
        (released / "model.safetensors.index.json").unlink()
    found = inspect(released)
    assert not found.fits
    assert (len(found.absent_files), found.num_files, found.num_tensors) == (3 if every else 0, 0, 0)
    if every:
        assert found.naming == "the release"
    else:
        assert len(found.problems) == 1
        assert "holds neither model.safetensors nor" in found.problems[0]
    assert found.cache.bytes_per_token > 0


@pytest.mark.parametrize(
    ("tp_size", "dtypes", "page", "token"),
    [
        (4, "fp8", 2_961_408, 23_136),
        (1, "fp8", 9_043_968, 70_656),
        (8, "fp8", 2_961_408, 23_136),
        (1, "bfloat16", 17_596_416, 137_472),
        (4, "bfloat16", 5_799_936, 45_312),
    ],
)
def test_the_released_models_cache_has_the_bytes_on_record(
    tmp_path: Path, tp_size: int, dtypes: str, page: int, token: int
):
    raw = released_config({**SMALL, **M3, "dtype": "bfloat16"} | _DEFAULTS)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    found = inspect(tmp_path, tp_size=tp_size, kv_dtype=dtypes, index_dtype=dtypes)
    assert (found.cache.bytes_per_page, found.cache.bytes_per_token) == (page, token)
    assert found.cache.row_pitch == page
    assert sum(region.bytes_per_page for region in found.cache.regions) == page
    assert len(found.weights) == tp_size
    parameters = sum(w.native_bytes for w in found.weights) / 2
    assert 425e9 < parameters < 440e9  # some 428 billion, norms and routers on every rank and in float32


_DEFAULTS = {
    "rms_norm_eps": 1e-6, "routed_scaling_factor": 2.0, "swiglu_alpha": 1.702, "swiglu_limit": 7.0,
    "tie_word_embeddings": False,
}  # fmt: skip


def test_experts_held_whole_are_uneven_where_they_must_be(source: Path, tmp_path: Path):
    write_random_checkpoint(tmp_path, 42, num_local_experts=5)
    uneven = inspect(tmp_path, tp_size=4, expert_parallel=True).weights
    assert [w.rank for w in uneven] == [0, 1, 2, 3]
    one_expert = 3 * 4 * (2 * 48 * 64 + 64 * 48)  # three layers, float32
    base = uneven[0].float32_bytes
    assert [w.float32_bytes - base for w in uneven] == [0, 0, 0, one_expert]
    even = inspect(source, tp_size=4, expert_parallel=True).weights
    assert len({w.float32_bytes for w in even}) == 1
    assert even[0] == RankWeights(0, even[0].float32_bytes, even[0].float32_bytes)


def test_what_cannot_be_divided_or_served_is_refused(source: Path, tmp_path: Path):
    with pytest.raises(ModelError, match="TP sizes that work: 1, 2, 4, 8"):
        inspect(source, tp_size=3)
    with pytest.raises(ModelError, match="K/V dtype 'int4' is not one of auto"):
        inspect(source, kv_dtype="int4")
    with pytest.raises(ModelError, match=r"config\.json does not exist"):
        inspect(tmp_path)
