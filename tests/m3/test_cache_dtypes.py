"""Every way to store state: what it lays out, whom it refuses, and that a model answers the same however it is run."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from pdkv_kernels.quantise_ref import FORMATS

from pdkv.core.manifest import check_pairing, differences, pairing_digest
from pdkv.errors import HandshakeError, ModelError
from pdkv.m3.config import INDEX_DTYPES, KV_DTYPES, IndexScheduleOverride, M3Config, kv_layout, load_config
from pdkv.m3.model import M3Model, load_model
from pdkv.memory.arena import DTYPES, Arena
from pdkv.memory.manifest import build_manifest
from pdkv.memory.probe import POISON, ProbePages
from pdkv.memory.row import RowLayout
from pdkv.schema import Incarnation, Manifest, Shard
from tests.checkpoints import write_random_checkpoint
from tests.m3.paged_run import PagedRun

OURS = ["float32", "bfloat16", "float16", "fp8", "fp8_unit", "fp8_e5m2"]
OUR_INDEX = ["float32", "bfloat16", "float16", "fp8"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("cache-dtypes")
    write_random_checkpoint(directory, 31, index_topk_blocks=3)
    return directory


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> M3Model:
    return load_model(checkpoint)


def manifest(config: M3Config, kv_dtype: str = "auto", index_dtype: str = "auto") -> Manifest:
    layout = kv_layout(config, kv_dtype, index_dtype)
    return build_manifest(Arena.allocate(RowLayout.of(layout), 3), layout, "the same model")


@pytest.mark.parametrize("tp_size", [1, 4])
@pytest.mark.parametrize(
    ("kv_dtype", "index_dtype"),
    [*zip(OURS, ["fp8", "bfloat16", "float32", "fp8", "fp8", "fp8"], strict=True), ("fp8", "float16")],
)
def test_views_are_aligned_and_the_probe_sees_every_byte(model: M3Model, kv_dtype: str, index_dtype: str, tp_size: int):
    layout = RowLayout.of(kv_layout(model.config, kv_dtype, index_dtype), tp_size - 1, tp_size)
    arena = Arena.allocate(layout, 3)
    for slot in layout.slots:
        assert slot.offset % max(slot.spec.itemsize, 16) == 0, "vector loads of 16 bytes"
        view = arena.view(slot.spec.name, slot.spec.layer)
        local = (slot.head - layout.heads.start,) if slot.spec.shard is Shard.BY_HEAD else ()
        assert view[(1, *local)].data_ptr() == arena.memory.address + layout.pitch + slot.offset
        assert view.dtype == DTYPES[slot.spec.dtype]
        assert view.itemsize == slot.spec.itemsize
        assert view.stride(0) * slot.spec.itemsize == layout.pitch
    probe, peer = ProbePages(arena), Incarnation(7 << 56)
    probe.fill(peer)
    assert probe.mismatches(peer, 0, 0) == []
    slot = layout.slots[-1]
    arena.page_bytes(slot.spec.name, slot.spec.layer, slot.head, 2)[-1] ^= 1
    assert [(key.name, key.layer) for key in probe.mismatches(peer, 2, 2)] == [(slot.spec.name, slot.spec.layer)]
    probe.poison()
    assert (arena.rows()[0, : layout.num_bytes] == POISON).all()


def test_names_of_torch_and_ours_mean_the_same(model: M3Model):
    for theirs, ours in (("float8_e4m3fn", "fp8"), ("float8_e5m2", "fp8_e5m2"), ("bfloat16", "bfloat16")):
        assert kv_layout(model.config, theirs, "fp8") == kv_layout(model.config, ours, "float8_e4m3fn")
    assert kv_layout(model.config) == kv_layout(model.config, "float32", "float32")
    assert set(OURS) <= KV_DTYPES.keys()
    assert set(OUR_INDEX) <= INDEX_DTYPES.keys()
    for kv, index in (("fp4", "auto"), ("auto", "fp8_e5m2"), ("auto", "fp8_unit")):
        with pytest.raises(ModelError, match="is not one of auto, float32"):
            kv_layout(model.config, kv, index)


@pytest.mark.parametrize(("name", "scaled"), [(name, name == "fp8") for name in OURS])
def test_scales_are_regions_of_dynamic_fp8_alone(model: M3Model, name: str, scaled: bool):
    layout = kv_layout(model.config, name, "fp8")
    scales = [spec for spec in layout.specs if spec.name.endswith("scale")]
    assert len(scales) == (8 if scaled else 0)
    assert {(spec.dtype, spec.elements_per_token) for spec in scales} == ({("float32", 1)} if scaled else set())


def test_the_convention_names_the_divisor_that_the_kernel_uses(model: M3Model):
    form = FORMATS[torch.float8_e4m3fn]
    assert kv_layout(model.config, "fp8").scale_convention == f"per-token-head-f32-absmax/{form.max:.0f}-{form.name}"
    assert kv_layout(model.config, "fp8_unit").scale_convention == "unit-e4m3fn"
    assert kv_layout(model.config, "fp8_e5m2").scale_convention == "unit-e5m2"
    assert kv_layout(model.config, "float16").scale_convention == "none"


@pytest.mark.parametrize(
    ("prefill", "decode", "told"),
    [
        ("fp8", "fp8_unit", "prefill has per-token-head-f32-absmax/448-e4m3fn, decode has unit-e4m3fn"),
        ("fp8", "fp8_unit", "prefill holds k_scale for layers 0..3; decode has no room for it"),
        ("fp8_unit", "fp8", "decode needs v_scale for layers 0..3; prefill offers none"),
        ("bfloat16", "fp8", "kv dtype: prefill has bfloat16, decode has float8_e4m3fn"),
        ("bfloat16", "float16", "kv dtype: prefill has bfloat16, decode has float16"),
        ("fp8_unit", "fp8_e5m2", "scale convention: prefill has unit-e4m3fn, decode has unit-e5m2"),
    ],
)
def test_workers_that_store_otherwise_are_refused_by_name(model: M3Model, prefill: str, decode: str, told: str):
    p, d = manifest(model.config, prefill), manifest(model.config, decode)
    assert any(told in found.message for found in differences([p], [d])), differences([p], [d])
    assert pairing_digest([p]) != pairing_digest([d])
    with pytest.raises(HandshakeError, match="manifests differ"):
        check_pairing([p], [d])


@pytest.mark.parametrize(
    "convention", ["per-token-head-f32-absmax/240-e4m3fn", "per-token-head-f32-absmax/240-e4m3fnuz", "unit-e4m3fn"]
)
def test_another_divisor_or_format_of_the_same_bytes_is_refused(model: M3Model, convention: str):
    ours = manifest(model.config, "fp8", "fp8")
    other = msgspec.structs.replace(ours, scale_convention=convention)
    (found,) = differences([other], [ours])
    assert found.message == f"scale convention: prefill has {convention}, decode has {ours.scale_convention}"


def test_finite_numbers_in_another_eight_bits_are_refused(model: M3Model):
    """fnuz bits mean half as much: another dtype of every region, for K/V and index keys each."""
    ours = manifest(model.config, "fp8", "fp8")
    swap = {"float8_e4m3fn": "float8_e4m3fnuz"}
    regions = tuple(msgspec.structs.replace(r, dtype=swap.get(r.dtype, r.dtype)) for r in ours.regions)
    other = msgspec.structs.replace(ours, index_dtype="float8_e4m3fnuz", regions=regions)
    told = " ".join(found.message for found in differences([other], [ours]))
    assert "index dtype: prefill has float8_e4m3fnuz, decode has float8_e4m3fn" in told
    assert "index_k of layer 1 head 0: prefill has float8_e4m3fnuz" in told
    assert "k of layer 0 head 0: prefill has float8_e4m3fnuz" in told


def test_another_schedule_is_refused_by_name(checkpoint: Path, model: M3Model):
    half = manifest(load_config(checkpoint, IndexScheduleOverride(topk_freq=2)))
    told = [found.message for found in differences([half], [manifest(model.config)])]
    assert "index schedule: prefill has layers 1, 3 select, decode has all" in told
    assert "decode needs index_k for layer 2; prefill offers none" in told


def poison(run: PagedRun) -> None:
    """Every byte of every page 0x7F: NaN in fp8, and in scales and other floats too."""
    rows = run.arena.rows()
    rows.fill_(0xFF)


def prompt(length: int) -> list[int]:
    return np.random.default_rng(length).integers(3, 320, length).tolist()


@pytest.mark.parametrize("index_dtype", ["float32", "fp8"])
@pytest.mark.parametrize("kv_dtype", ["float32", "fp8", "fp8_e5m2"])
def test_chunks_pages_and_stale_bytes_do_not_change_the_answer(model: M3Model, kv_dtype: str, index_dtype: str):
    """K and V of a token hang on how float32 sums were ordered before it, by less than a rounding of the cache: so what
    is compared is the same chunks in other pages, exactly, and other chunks, nearly."""
    ids = prompt(450)
    runs = [PagedRun(model, 452, seed, kv_dtype, index_dtype) for seed in (1, 2, 3)]
    for run in runs:
        poison(run)
    one, same, other = (run.prefill(ids, chunk) for run, chunk in zip(runs, (170, 170, 450), strict=True))
    assert one.isfinite().all()
    assert torch.equal(one, same)
    assert torch.equal(runs[0].feed([7]), runs[1].feed([7]))
    assert float((other - one).abs().max()) < {"float32": 1e-3}.get(kv_dtype, 0.2) * float(one.std())


@pytest.mark.parametrize(
    ("kv_dtype", "most"), [("float16", 0.01), ("bfloat16", 0.2), ("fp8", 0.4), ("fp8_unit", 0.4), ("fp8_e5m2", 0.6)]
)
def test_what_storage_costs(model: M3Model, kv_dtype: str, most: float):
    """Root mean square of the logits' error, relative, against float32 state; the random model is at its sharpest."""
    ids = prompt(300)
    exact = PagedRun(model, 300).feed(ids, list(range(300)))
    near = PagedRun(model, 300, 0, kv_dtype, "float32").feed(ids, list(range(300)))
    off = float((near - exact).square().mean().sqrt() / exact.std())
    print(f"{kv_dtype}: {off:.4f}")  # noqa: T201
    assert most / 30 < off < most


def test_scales_of_a_layer_swapped_or_lost_change_the_answer(model: M3Model):
    run = PagedRun(model, 301, 0, "fp8", "fp8")
    run.prefill(prompt(300), 300)
    exact = run.feed([9])
    for name in ("k_scale", "v_scale"):
        for how in ("unit", "rolled", "of the next head"):
            view = run.arena.view(name, 1)
            kept = view.clone()
            wrong = {
                "unit": torch.ones_like(kept),
                "rolled": kept.roll(1, dims=2),
                "of the next head": kept.roll(1, dims=1),
            }
            view.copy_(wrong[how])
            run.num_tokens = 300
            moved = float((run.feed([9]) - exact).abs().max())
            view.copy_(kept)
            assert not moved < 1e-3, (name, how, moved)
