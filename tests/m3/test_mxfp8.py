"""MXFP8 checkpoints: exact values, any slice of them, every naming, and everything that is not MXFP8 refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pdkv.errors import CheckpointError, ModelError
from pdkv.m3.config import load_config
from pdkv.m3.model import load_model
from pdkv.m3.mxfp8 import dequantise
from pdkv.m3.parallel import run_ranks
from pdkv.m3.quantisation import scale_columns
from pdkv.m3.sharding import model_share
from pdkv.m3.weights import M3Weights, load_weights
from pdkv.verify.equality import compare_logits
from tests.checkpoints import Oracle, OracleCase, write_random_checkpoint, write_shards
from tests.m3.mxfp8_checkpoint import QUANTIZATION, change_config, dequantised, write_mxfp8
from tests.m3.rank_work import Asked, answer
from tests.m3.weight_tensors import tensors

MOE = "language_model.model.layers.2.block_sparse_moe."
LENGTH = 500


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``source``, ``released`` (three shards), ``fused`` (one file, E8M0 as its own dtype), and ``oracle``."""
    directory = tmp_path_factory.mktemp("mxfp8")
    write_random_checkpoint(directory / "source", 31)
    write_mxfp8(directory / "source", directory / "released", directory / "oracle")
    write_mxfp8(directory / "source", directory / "fused", directory / "oracle", released=False, shards=1, e8m0=True)
    return directory


@pytest.fixture(scope="module")
def case(folder: Path) -> OracleCase:
    return Oracle(folder / "oracle").case(LENGTH, 3, 31)


def weights(directory: Path, rank: int = 0, size: int = 1) -> M3Weights:
    config = load_config(directory)
    return load_weights(directory, config, "cpu", torch.float32, model_share(config, rank, size))


@pytest.mark.parametrize("form", ["released", "fused"])
def test_values_are_exact(folder: Path, form: str):
    expected = tensors(weights(folder / "oracle"))
    found = tensors(weights(folder / form))
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_slices_that_begin_and_end_inside_a_group_of_scales(folder: Path, size: int):
    """Shared experts of 40 columns are cut every 20, 10, 5; experts of 48 every 24, 12, 6."""
    for rank in range(size):
        for form in ("released", "fused"):
            found, expected = (
                tensors(weights(folder / form, rank, size)),
                tensors(weights(folder / "oracle", rank, size)),
            )
            for mine, theirs in zip(found, expected, strict=True):
                assert torch.equal(mine, theirs)


@pytest.mark.parametrize(("form", "size"), [("released", 1), ("fused", 1), ("released", 2), ("fused", 8)])
def test_answers_equal_transformers_on_the_values(folder: Path, case: OracleCase, form: str, size: int):
    logits = run_ranks(size, lambda group: answer(folder / form, Asked(case.prompt, case.tokens), group))[0]
    verdict = compare_logits(logits.numpy(), case.logits)
    print(verdict)  # noqa: T201
    assert verdict.equal, verdict


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_plain_checkpoints_of_half_precision(tmp_path: Path, dtype: torch.dtype):
    write_random_checkpoint(tmp_path, 32, dtype)
    case = Oracle(tmp_path).case(LENGTH, 3, 32)
    assert load_config(tmp_path).dtype == str(dtype).removeprefix("torch.")
    for size in (1, 2):
        logits = run_ranks(size, lambda group: answer(tmp_path, Asked(case.prompt, case.tokens), group))[0]
        verdict = compare_logits(logits.numpy(), case.logits)
        assert verdict.equal, verdict


def test_every_element_under_every_scale():
    codes = torch.tensor([code for code in range(256) if code & 127 != 127], dtype=torch.uint8)  # 127: no number
    elements = codes.view(torch.float8_e4m3fn)[None].expand(246, -1)
    exponents = torch.arange(246, dtype=torch.uint8)[:, None].expand(-1, 8)  # 448 x 2**119 overflows
    values = dequantise("w", elements, exponents, 0)
    exact = codes.view(torch.float8_e4m3fn).double() * torch.exp2(torch.arange(246).double() - 127)[:, None]
    assert torch.equal(values.double(), exact)
    assert (values != 0).sum() == 246 * 252  # the smallest, 2**-9 x 2**-127, is there too


@pytest.mark.parametrize(("begin", "end"), [(0, 96), (5, 6), (31, 33), (48, 96), (64, 90)])
def test_any_run_of_columns(begin: int, end: int):
    generator = torch.Generator().manual_seed(begin)
    elements = torch.randn(7, 96, generator=generator).to(torch.float8_e4m3fn)
    exponents = torch.randint(100, 140, (7, 3), generator=generator, dtype=torch.uint8)
    held = scale_columns(range(begin, end))
    found = dequantise("w", elements[:, begin:end], exponents[:, held.start : held.stop], begin)
    assert torch.equal(found, dequantised(elements, exponents)[:, begin:end])


@pytest.mark.parametrize("where", ["weight", "weight_scale_inv"])
def test_values_that_are_no_numbers_are_refused(folder: Path, tmp_path: Path, where: str):
    name = f"{MOE}experts.1.w2."
    wrong = changed(folder / "released", tmp_path, {})
    held = load_file(wrong / "model.safetensors")
    held[name + where].view(torch.uint8)[3, 0] = 127 if where == "weight" else 255
    write_shards(wrong, held, 1)
    with pytest.raises(
        CheckpointError, match=r"experts\.1\.w2\.weight or its scales .* hold values that are no numbers"
    ):
        load_model(wrong)


def test_a_rank_never_looks_at_what_belongs_to_another(folder: Path, tmp_path: Path):
    """A value that is no number in rank 1's half of a matrix is rank 1's alone to find."""
    wrong = changed(folder / "released", tmp_path, {})
    held = load_file(wrong / "model.safetensors")
    held[f"{MOE}experts.1.w2.weight"].view(torch.uint8)[3, 47] = 127
    held[f"{MOE}experts.1.w1.weight"].view(torch.uint8)[47, 3] = 127
    write_shards(wrong, held, 1)
    assert all(bool(tensor.isfinite().all()) for tensor in tensors(weights(wrong, 0, 2)))
    with pytest.raises(CheckpointError, match="no numbers"):
        weights(wrong, 1, 2)


def changed(source: Path, target: Path, tensors: dict[str, torch.Tensor | None]) -> Path:
    """The checkpoint in one file, with tensors replaced, added, or taken away (None)."""
    held = {name: t for path in source.glob("*.safetensors") for name, t in load_file(path).items()} | tensors
    write_shards(target, {name: t for name, t in held.items() if t is not None}, 1)
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    return target


def test_every_misfit_of_quantised_tensors_is_named(folder: Path, tmp_path: Path):
    down, up = f"{MOE}experts.0.w2.weight", f"{MOE}shared_experts.up_proj.weight"
    wrong = changed(
        folder / "released",
        tmp_path,
        {
            f"{down}_scale_inv": None,
            f"{up}_scale_inv": torch.ones(1, 1),
            f"{MOE}gate.weight": torch.zeros(4, 64).to(torch.float8_e4m3fn),
            f"{MOE}gate.weight_scale_inv": torch.zeros(4, 2, dtype=torch.uint8),
            "language_model.model.norm.weight_scale_inv": torch.zeros(2, dtype=torch.uint8),
        },
    )
    with pytest.raises(CheckpointError) as caught:
        load_model(wrong)
    text = str(caught.value)
    assert "6 problems" in text
    assert f"missing: {down}_scale_inv [64, 2]" in text
    assert f"mis-shaped: {up}_scale_inv is [1, 1], the config asks for [40, 2]" in text
    assert f"mis-typed: {up}_scale_inv is F32, served are F8_E8M0, U8" in text
    assert f"mis-typed: {MOE}gate.weight is F8_E4M3, served are BF16, F16, F32" in text
    assert f"extra: {MOE}gate.weight_scale_inv" in text
    assert "extra: language_model.model.norm.weight_scale_inv" in text


def test_quantised_tensors_that_the_config_does_not_announce(folder: Path, tmp_path: Path):
    silent = changed(folder / "released", tmp_path, {})
    change_config(silent, quantization_config=None)
    with pytest.raises(CheckpointError) as caught:
        load_model(silent)
    assert f"mis-typed: {MOE}experts.0.w1.weight is F8_E4M3" in str(caught.value)
    assert "need a quantization_config" in str(caught.value)
    assert f"extra: {MOE}experts.0.w1.weight_scale_inv" in str(caught.value)


@pytest.mark.parametrize(
    "spelling",
    [
        {"quant_method": "mxfp8"},
        {"quant_method": "fp8", "weight_block_size": [1, 32], "fmt": "e4m3"},
        {"quant_method": "fp8", "weight_block_size": [1, 32], "scale_fmt": "ue8m0", "ignored_layers": []},
    ],
)
def test_spellings_of_mxfp8(folder: Path, tmp_path: Path, spelling: dict[str, object]):
    (tmp_path / "config.json").write_bytes((folder / "released" / "config.json").read_bytes())
    change_config(tmp_path, quantization_config=spelling)
    assert load_config(tmp_path).quantisation == "mxfp8"


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (
            {"quant_method": "modelopt", "quant_algo": "NVFP4"},
            r"is 'modelopt' \(quant_algo 'NVFP4'\), served are plain",
        ),
        ({"quant_method": "awq", "bits": 4}, "quant_method is 'awq'"),
        ({"quant_method": "mxfp4"}, "quant_method is 'mxfp4'"),
        ({"bits": 4}, "quantization_config.quant_method is None"),
        ({"quant_method": "fp8"}, "weight_block_size is missing"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, r"is \[128, 128\], only \[1, 32\] is implemented"),
        ({"quant_method": "mxfp8", "activation_scheme": "static"}, "activation_scheme is 'static'"),
        ({"quant_method": "mxfp8", "kv_cache_scheme": {}}, "kv_cache_scheme is not a field that pdkv knows"),
    ],
)
def test_other_quantisations_are_refused_by_name(folder: Path, tmp_path: Path, wrong: dict[str, object], said: str):
    (tmp_path / "config.json").write_bytes((folder / "released" / "config.json").read_bytes())
    change_config(tmp_path, quantization_config=wrong)
    with pytest.raises(ModelError, match=said):
        load_config(tmp_path)


def test_the_field_may_stand_in_a_flat_config_too(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((folder / "fused" / "config.json").read_bytes())
    assert load_config(tmp_path).quantisation == "mxfp8"
    change_config(tmp_path, quantization_config={**QUANTIZATION, "group_size": 64})
    with pytest.raises(ModelError, match="group_size is 64, only 32"):
        load_config(tmp_path)
