"""``pdkv bench``: its help, its forms of output, its exit codes."""

import json
from pathlib import Path
from subprocess import CompletedProcess

from tests import commands


def pdkv(*arguments: str) -> CompletedProcess[str]:
    return commands.pdkv("bench", *arguments)


def test_help_names_them_and_gives_examples() -> None:
    assert {"xfer", "serve", "plan", "chart"} <= set(pdkv("--help").stdout.split())
    for command in ("xfer", "serve", "plan", "chart"):
        shown = pdkv(command, "--help").stdout
        assert "Examples:" in shown
        assert len(shown.splitlines()) <= 60


def test_a_small_race_as_json_with_a_chart(tmp_path: Path) -> None:
    chart = tmp_path / "chart.svg"
    small = ("--tokens", "128", "--path", "tcp", "--layout", "arena", "--repeats", "1")
    done = pdkv("xfer", *small, "--vs", "mooncake", "--tools", str(tmp_path), "--json", "--chart", str(chart))
    assert done.returncode == 0, done.stderr
    results = {result["contestant"]: result for result in json.loads(done.stdout)["results"]}
    assert results["pdkv"]["correct"]
    assert not results["mooncake"]["correct"], "it is not installed there"
    assert "make bench-tools" in results["mooncake"]["error"]
    assert chart.read_text().startswith("<svg")
    (tmp_path / "run.json").write_text(done.stdout)
    again = pdkv("chart", str(tmp_path / "run.json"), "--markdown", "-o", str(tmp_path / "again.svg"))
    assert (tmp_path / "again.svg").read_bytes() == chart.read_bytes()
    assert "| tcp | arena | pdkv | " in again.stdout
    (tmp_path / "run.json").write_text("{}")
    assert "is no report of `pdkv bench xfer --json`" in pdkv("chart", str(tmp_path / "run.json")).stderr


def test_planning_as_text_and_json() -> None:
    small = ("plan", "--tokens", "2048", "--requests", "20")
    assert "after 20 requests" in pdkv(*small).stdout
    assert json.loads(pdkv(*small, "--json").stdout)["costs"][0]["spans"] == 16


def test_names_that_there_are_not() -> None:
    done = pdkv("xfer", "--path", "pigeon")
    assert done.returncode == 2
    assert done.stderr == "pdkv: error: path 'pigeon' is not one of shm, tcp, cuda_ipc\n"
    done = pdkv("xfer", "--gpus", "0")
    assert (done.returncode, done.stderr) == (2, "pdkv: error: --gpus '0' is not two numbers of GPUs, as 0,1\n")


def test_a_server_that_is_not_there_and_a_checkpoint_that_is_none(tmp_path: Path) -> None:
    done = pdkv("serve", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1
    assert done.stderr.startswith("pdkv: error: no model is served at http://127.0.0.1:1")
    done = pdkv("serve", "--model", str(tmp_path))
    assert done.returncode == 2
    assert "holds no config.json" in done.stderr
    done = pdkv("serve", "--model", str(tmp_path), "--m3-layers", "2")
    assert "--m3-layers makes a model of its own" in done.stderr
    done = pdkv("serve", "--transport", "pigeon")
    assert done.returncode == 2
    assert "--transport" in done.stderr
