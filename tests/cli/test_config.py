"""``pdkv config`` and ``pdkv metrics``: what would be run, where it came from, and what is wrong with it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from pdkv.metric_table import TABLE


def _pdkv(*args: str, **variables: str) -> subprocess.CompletedProcess[str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PDKV_")}
    return subprocess.run(
        [sys.executable, "-m", "pdkv", *args],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**clean, **variables},
    )


def test_show_tells_every_value_and_where_it_came_from(tmp_path: Path) -> None:
    file = tmp_path / "pdkv.yaml"
    file.write_text("model: m\nmax_batch: 2\nprefill_chunk: 64\n")
    args = ("config", "show", "decode", "--config", str(file), "--max-batch", "3")
    shown = _pdkv(*args, "--json", PDKV_DTYPE="bfloat16")
    assert shown.returncode == 0, shown.stderr
    document = json.loads(shown.stdout)
    assert (document["schema"], document["role"]) == ("pdkv.config/v1", "decode")
    told = {s["name"]: (s["value"], s["source"], s["where"]) for s in document["settings"]}
    assert told["max_batch"] == (3, "flag", "--max-batch")
    assert told["dtype"] == ("bfloat16", "env", "PDKV_DTYPE")
    assert told["prefill_chunk"] == (64, "yaml", str(file))
    assert told["drain_timeout"] == (300.0, "default", "")
    table = _pdkv(*args).stdout.splitlines()
    assert [line.split() for line in table if line.startswith("max_batch")] == [
        ["max_batch", "3", "flag", "--max-batch"]
    ]


def test_show_goes_on_without_what_is_missing() -> None:
    shown = _pdkv("config", "show", "router")
    assert shown.returncode == 2
    assert "prefill_urls" in shown.stdout
    assert "--prefill is missing" in shown.stderr


@pytest.mark.parametrize(
    ("args", "code", "told"),
    [
        (("up", "--model", "m"), 0, "ok: up"),
        (("up", "--model", "m", "--max-batch", "0"), 2, "--max-batch: Input should be greater"),
        (("router", "--prefill", "http://a:1", "--decode", "b"), 2, "is not a URL"),
        (("prefill", "--model", "m", "--config", "/does/not/exist"), 2, "cannot read the configuration file"),
    ],
)
def test_validate_ends_with_2_for_what_is_wrong(args: tuple[str, ...], code: int, told: str) -> None:
    ended = _pdkv("config", "validate", *args)
    assert ended.returncode == code
    assert told in (ended.stdout if code == 0 else ended.stderr)


def test_the_list_of_metrics_is_the_table() -> None:
    listed = json.loads(_pdkv("metrics", "list", "--json").stdout)
    assert [metric["name"] for metric in listed["metrics"]] == [metric.name for metric in TABLE]
    lines = _pdkv("metrics", "list", "--role", "router").stdout.splitlines()
    assert {line.split()[0] for line in lines} == {metric.name for metric in TABLE if "router" in metric.roles}
    assert _pdkv("metrics", "list", "--role", "cook").returncode == 2


@pytest.mark.parametrize("role", ["prefill", "decode", "router", "up"])
def test_a_files_schema_is_what_the_role_takes(role: str) -> None:
    told = _pdkv("config", "schema", role)
    assert told.returncode == 0, told.stderr
    schema = json.loads(told.stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    files = {
        "router": {"prefill_urls": ["http://p:1"], "decode_urls": ["dns://d:1"], "retries": 1},
        "up": {"model": "m", "num_prefill": 2, "drain_timeout": 3},
    }
    good = files.get(role, {"model": "m", "max_batch": 2, "require_transport": "tcp", "ucx_tls": None})
    assert check.is_valid(good)
    assert check.is_valid({}), "flags and variables may say all of it"
    assert not check.is_valid({**good, "log_level": "loud"})
    assert not check.is_valid({**good, "no_such_key": 1})
    assert "reuse_port" not in schema["properties"], "between our own processes"
    assert all(field["description"] for field in schema["properties"].values())
