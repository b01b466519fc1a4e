"""``pdkv manifest`` against real workers, and against files that one of them wrote."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app
from tests.e2e.deployment import Trio


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, args)


@pytest.fixture
def saved(three: Trio, tmp_path: Path) -> Path:
    """What the prefill worker holds."""
    file = tmp_path / "prefill.json"
    file.write_text(pdkv("manifest", "show", three.prefill.url, "--json").stdout)
    return file


def test_a_manifest_is_shown_region_by_region(three: Trio, saved: Path) -> None:
    info = three.prefill.info()
    document = json.loads(saved.read_text())
    assert (document["schema"], document["role"]) == ("pdkv.manifest/v1", "prefill")
    assert document["manifest_digest"] == info["manifest_digest"]
    assert [rank["num_pages"] for rank in document["ranks"]] == [info["num_pages"]]
    shown = pdkv("manifest", "show", three.prefill.url).stdout
    assert shown == pdkv("manifest", "show", str(saved)).stdout
    per_layer = {line.split()[0]: line for line in shown.splitlines() if line.startswith("  ")}
    for region in info["regions"]:  # type: ignore[attr-defined]
        assert f"layers {region['layers']}," in per_layer[region["name"]]


def test_workers_of_one_deployment_fit_together(three: Trio, saved: Path) -> None:
    for prefill in (three.prefill.url, str(saved)):
        told = pdkv("manifest", "diff", prefill, three.decode.url)
        assert told.exit_code == 0, told.stderr
        assert "fit together" in told.stdout


def _without_index_keys(document: dict[str, Any]) -> None:
    for rank in document["ranks"]:
        rank["regions"] = [region for region in rank["regions"] if region["name"] != "index_k"]


def _in_fp8(document: dict[str, Any]) -> None:
    document["ranks"][0]["kv_dtype"] = "fp8"


def _with_another_tokenizer(document: dict[str, Any]) -> None:
    document["prompt_digest"] = "another"


@pytest.mark.parametrize(
    ("change", "subject"),
    [(_without_index_keys, "index_k"), (_in_fp8, "kv_dtype"), (_with_another_tokenizer, "tokenizer")],
)
def test_what_differs_is_named(three: Trio, saved: Path, change: Callable[[dict[str, Any]], None], subject: str):
    document = json.loads(saved.read_text())
    change(document)
    saved.write_text(json.dumps(document))
    told = pdkv("manifest", "diff", str(saved), three.decode.url)
    assert told.exit_code == 6
    lines = [line for line in told.stdout.splitlines() if line.startswith(subject)]
    assert len(lines) == 1
    found = json.loads(pdkv("manifest", "diff", str(saved), three.decode.url, "--json").stdout)
    assert (found["schema"], found["compatible"]) == ("pdkv.manifest-diff/v1", False)
    (difference,) = found["differences"]
    assert f": a has {difference['a']}, b has {difference['b']}" in lines[0]
    if subject == "index_k":
        assert difference["a"] == "none"
        assert difference["b"].startswith("layers")


def test_ranks_that_are_no_whole_fit_nobody(three: Trio, saved: Path) -> None:
    document = json.loads(saved.read_text())
    document["ranks"][0]["tp_size"] = 2
    saved.write_text(json.dumps(document))
    told = pdkv("manifest", "diff", three.decode.url, str(saved))
    assert told.exit_code == 6
    assert "ranks are no whole" in told.stderr


def test_what_is_no_manifest_is_told(three: Trio, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    for source, code, message in (
        (str(tmp_path / "none.json"), 2, "no file that can be read"),
        (str(tmp_path / "empty.json"), 2, "holds no manifest"),
        ("http://127.0.0.1:9", 1, "no daemon answers"),
        (three.router.url, 1, "no such route"),
    ):
        told = pdkv("manifest", "show", source)
        assert told.exit_code == code
        assert message in told.stderr
