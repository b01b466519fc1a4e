"""``pdkv verify``: right as it is, wrong with a region lost, undecided without a long prompt, and its report."""

import json
from subprocess import CompletedProcess

import numpy as np
import pytest

from pdkv.errors import ConfigError
from pdkv.memory.row import RowLayout
from pdkv.schema import ReadBatch
from pdkv.verify.tampering import Mutation, rows_of, without_region
from tests.commands import pdkv
from tests.layouts import make_layout

REGIONS = ("index_k", "k", "v")


def verify(*flags: str) -> CompletedProcess[str]:
    return pdkv("verify", *flags, OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE")


@pytest.mark.parametrize("mutation", ["drop:index_k"])
def test_a_lost_region_is_wrong_and_named(mutation: str) -> None:
    done = verify("--mutate", mutation, "--lengths", "2304")
    assert done.returncode == 4, done.stdout + done.stderr
    region = mutation.partition(":")[2]
    assert f"{region} differs after the transfer" in done.stdout
    assert "the answer is wrong from step" in done.stdout


def test_without_a_long_prompt_it_cannot_tell() -> None:
    done = verify("--lengths", "256", "--json")
    assert done.returncode == 5, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["verdict"] == "inconclusive"
    assert "blind window" in report["open_questions"][0]


@pytest.mark.parametrize(
    "flags",
    [
        ("--mutate", "drop:everything"),
        ("--mutate", "zero:k_scale"),
        ("--suite", "none"),
        ("--lengths", "12,a"),
        ("--kv-dtype", "int4"),
    ],
)
def test_bad_flags_are_usage_errors(flags: tuple[str, str]) -> None:
    done = verify(*flags)
    assert done.returncode == 2
    assert flags[0] in done.stderr or flags[1] in done.stderr


def test_mutations_are_parsed() -> None:
    assert str(Mutation.parse("zero:k", REGIONS)) == "zero:k"
    with pytest.raises(ConfigError, match="one of index_k, k, v"):
        Mutation.parse("zero", REGIONS)


def test_runs_are_cut_into_rows_and_a_region_is_cut_out_of_them() -> None:
    layout = RowLayout.of(make_layout(num_layers=2, num_dense=1, num_kv_heads=2, head_dim=16))
    run = (3 - 1) * layout.pitch + layout.num_bytes
    batch = ReadBatch(*(np.array([x], dtype=np.int64) for x in (0, 5 * layout.pitch, 1000, run)))
    rows = rows_of(batch, layout.pitch)
    assert rows.remote.tolist() == [5 * layout.pitch, 6 * layout.pitch, 7 * layout.pitch]
    assert rows.local.tolist() == [1000, 1000 + layout.pitch, 1000 + 2 * layout.pitch]
    left = without_region(rows, np.zeros(3, dtype=np.int64), layout, "v")
    touched = touches(left, 1000, 3 * layout.pitch)
    for row in range(3):
        for slot in layout.slots:
            where = slice(row * layout.pitch + slot.offset, row * layout.pitch + slot.offset + slot.num_bytes)
            assert (touched[where] == (slot.spec.name != "v")).all()


def test_a_region_is_cut_out_of_a_layer_group_of_a_row() -> None:
    layout = RowLayout.of(make_layout(num_layers=2, num_dense=1, num_kv_heads=2, head_dim=16))
    wanted = [slot for slot in layout.slots if slot.spec.layer == 1]
    within = np.array([slot.offset for slot in wanted], dtype=np.int64)
    length = np.array([slot.num_bytes for slot in wanted], dtype=np.int64)
    rows = ReadBatch(np.zeros_like(within), 7 * layout.pitch + within, 1000 + within, length)
    left = without_region(rows, within, layout, "k")
    assert (left.local - 1000 == left.remote - 7 * layout.pitch).all()
    touched = touches(left, 1000, layout.pitch)
    for slot in layout.slots:
        where = slice(slot.offset, slot.offset + slot.num_bytes)
        assert (touched[where] == (slot in wanted and slot.spec.name != "k")).all()


def touches(batch: ReadBatch, base: int, size: int) -> np.ndarray:
    """How often a batch writes each byte behind ``base``."""
    touched = np.zeros(size, dtype=int)
    for start, length in zip(batch.local - base, batch.length, strict=True):
        touched[start : start + length] += 1
    return touched
