"""``pdkv checkpoint inspect``: its text, its JSON, its exit codes."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from pdkv.verify.link_chasing_checkpoint import write_checkpoint


def inspect(*args: object) -> Result:
    return CliRunner().invoke(app, ["checkpoint", "inspect", *map(str, args)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(directory)
    return directory


def test_a_whole_checkpoint_is_told_on_one_screen(folder: Path):
    told = inspect(folder, "--tp", 2, "--ep", "--kv-dtype", "fp8", "--index-dtype", "fp8")
    assert told.exit_code == 0, told.stderr
    lines = told.stdout.splitlines()
    assert lines[0] == f"checkpoint   {folder}"
    assert lines[-1] == "verdict      everything is there"
    assert any(line.startswith("  rank 0..1: weights ") for line in lines)
    assert any(line.startswith("  k_scale    float32, 4 layers, 2 heads: 32 B/token") for line in lines)
    assert len(lines) < 30


def test_missing_files_are_counted_and_the_exit_code_says_so(folder: Path, tmp_path: Path):
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    names = {"lm_head.weight": "a.safetensors", "model.norm.weight": "a.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    told = inspect(tmp_path)
    assert told.exit_code == 3, told.stderr
    assert "  a.safetensors is not there; 2 tensors are missing with it" in told.stdout.splitlines()
    assert "lm_head.weight" not in told.stdout
    shown = inspect(tmp_path, "--json")
    assert shown.exit_code == 3
    document = json.loads(shown.stdout)
    assert document["schema"] == "pdkv.checkpoint/v1"
    assert document["absent_files"] == ["a.safetensors"]
    assert any(problem.startswith("missing: lm_head.weight") for problem in document["problems"])


def test_a_config_that_cannot_be_served_is_an_error(tmp_path: Path):
    told = inspect(tmp_path)
    assert told.exit_code == 2
    assert told.stderr.startswith("pdkv: error: ")
    assert len(told.stderr.splitlines()) == 1
