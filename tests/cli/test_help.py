"""Help is short, shows examples and loads nothing heavy; errors are one line with the right exit code."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import pdkv
from tests import commands

COMMANDS = ["up", "prefill", "decode", "router", "generate", "demo", "demo-model", "version"]

_REPORT_IMPORTS = """
import sys
from pdkv.__main__ import main
try:
    main()
finally:
    heavy = {"torch", "starlette", "uvicorn", "transformers"} & set(sys.modules)
    assert not heavy, heavy
"""


def _pdkv(*args: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pdkv", *args], capture_output=True, text=True, timeout=60, check=False, env=env
    )


@pytest.mark.parametrize("command", [[], ["checkpoint", "inspect"], *([name] for name in COMMANDS)])
def test_help_fits_a_screen_and_loads_nothing_heavy(command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-c", _REPORT_IMPORTS, *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"COLUMNS": "80", "PYTHONPATH": ":".join(sys.path)},
    )
    assert shown.returncode == 0, shown.stderr
    lines = shown.stdout.splitlines()
    assert 5 <= len(lines) <= 60
    if command != ["version"]:
        assert "Examples:" in shown.stdout
    assert lines[0].startswith(" ".join(["Usage: pdkv", *command]))


def test_advanced_flags_are_shown_on_demand() -> None:
    assert "--lease-ttl" not in _pdkv("prefill", "--help").stdout
    everything = _pdkv("prefill", "--help-all").stdout
    assert "--lease-ttl" in everything
    assert "--reuse-port" not in everything


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["nonsense"], "No such command 'nonsense'"),
        (["up"], "--model is missing"),
        (["up", "--prefil", "2"], "No such option"),
        (["prefill", "--model", "/does/not/exist"], "/does/not/exist"),
        (["prefill", "--model", "m", "--listen", "0.0.0.0:1"], "does not authenticate"),
        (["prefill", "--model", "m", "--control-keys", "/does/not/exist"], "/does/not/exist is no folder"),
        (["up", "--model", "m", "--control-keys", "/does/not/exist"], "/does/not/exist is no folder"),
        (["router", "--prefill", "http://a:1"], "--decode is missing"),
        (["generate", "--model", "m"], "--prompt"),
        (["demo", "--steps", "3"], "--steps"),
    ],
)
def test_usage_errors_are_clear_and_end_with_2(args: list[str], message: str) -> None:
    ended = _pdkv(*args)
    assert ended.returncode == 2
    assert message in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""


def test_an_unknown_variable_ends_with_2() -> None:
    ended = _pdkv("up", env={"PDKV_MODLE": "x", "PYTHONPATH": ":".join(sys.path)})
    assert (ended.returncode, ended.stdout) == (2, "")
    assert "did you mean PDKV_MODEL?" in ended.stderr


def test_version() -> None:
    assert _pdkv("version").stdout.strip() == pdkv.__version__
    assert json.loads(_pdkv("version", "--json").stdout)["version"] == pdkv.__version__


def test_demo_model_writes_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "model"
    assert _pdkv("demo-model", str(folder)).stdout.strip() == str(folder)
    written = {path.name for path in folder.iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}


@pytest.mark.parametrize("ids", ["[1, 2, 64]", "1 2\n64"])
def test_generate_undivided_takes_ids_from_a_file(tmp_path: Path, ids: str) -> None:
    commands.pdkv("demo-model", str(tmp_path / "model"), "--index-topk-freq", "2")
    (tmp_path / "ids").write_text(ids)
    flags = ["--model", str(tmp_path / "model"), "--max-tokens", "2", "--undivided", "--json", "--kv-dtype", "fp8"]
    answer = json.loads(commands.pdkv("generate", "--prompt-ids", str(tmp_path / "ids"), *flags).stdout)
    assert answer["prompt_tokens"] == 3
    assert answer["text"].startswith("<lost>") or answer["token_ids"]
