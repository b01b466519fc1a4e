"""``pdkv keys``: pairs are made once and shown by their public halves; a secret is printed by nothing."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from pdkv.cli import app


def pdkv(*args: str) -> Result:
    return CliRunner().invoke(app, list(args))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert pdkv("keys", "new", str(tmp_path / "keys")).exit_code == 0
    return tmp_path / "keys"


def test_new_keys_are_shown_as_they_are_made(tmp_path: Path) -> None:
    made = pdkv("keys", "new", str(tmp_path / "a"), "--json")
    assert made.exit_code == 0, made.stderr
    document = json.loads(made.stdout)
    assert document["schema"] == "pdkv.keys/v1"
    assert document == json.loads(pdkv("keys", "show", str(tmp_path / "a"), "--json").stdout)
    (own,) = document["accepted"]
    assert own["fingerprint"] == document["fingerprint"]
    assert own["public"] in (tmp_path / "a/worker.public").read_text()


def test_show_names_every_key_and_its_file(folder: Path, tmp_path: Path) -> None:
    pdkv("keys", "new", str(tmp_path / "next"))
    (folder / "next.public").write_text((tmp_path / "next/worker.public").read_text())
    own, other = pdkv("keys", "show", str(folder)).stdout.splitlines()
    assert own.split()[2:] == ["own", "worker.public"]
    assert other.split()[2:] == ["also", "accepted", "next.public"]


def test_an_existing_pair_stays(folder: Path) -> None:
    again = pdkv("keys", "new", str(folder))
    assert (again.exit_code, again.stdout) == (2, "")
    assert "is not overwritten" in again.stderr


def test_a_secret_is_printed_by_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = (folder / "worker.secret").read_text().split()[1]
    monkeypatch.setenv("PDKV_CONTROL_KEYS", str(folder))
    commands = [
        ("keys", "show", str(folder)),
        ("keys", "show", str(folder), "--json"),
        ("keys", "new", str(folder)),
        ("config", "show", "prefill", "--model", "m"),
        ("config", "show", "prefill", "--model", "m", "--json"),
        ("config", "explain", "control_keys"),
    ]
    for command in commands:
        said = pdkv(*command).output
        assert said
        assert secret not in said
    (folder / "worker.secret").chmod(0o644)
    refused = pdkv("keys", "show", str(folder))
    assert refused.exit_code == 2
    assert "chmod 600" in refused.stderr
    assert secret not in refused.output
