"""Folders of keys: what is written, what is accepted, and what is refused without a word of what it holds."""

import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from pdkv.daemons.control_keys import channel_security, new_keys, read_keys, show_keys
from pdkv.errors import ConfigError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    new_keys(tmp_path / "keys")
    return tmp_path / "keys"


def secret_digits(folder: Path) -> str:
    return (folder / "worker.secret").read_text().split()[1]


def test_a_pair_is_written_for_its_owner_alone(folder: Path) -> None:
    before = os.umask(0)
    try:
        new_keys(folder.parent / "with an open hand")
    finally:
        os.umask(before)
    for each in (folder, folder.parent / "with an open hand"):
        assert stat.S_IMODE(each.stat().st_mode) == 0o700
        assert stat.S_IMODE((each / "worker.secret").stat().st_mode) == 0o600
        assert stat.S_IMODE((each / "worker.public").stat().st_mode) == 0o644
        keys = read_keys(each)
        assert keys.accepted == (keys.own,)


@pytest.mark.parametrize("left", ["worker.secret", "worker.public"])
def test_nothing_is_overwritten(folder: Path, left: str) -> None:
    gone = {"worker.secret": "worker.public", "worker.public": "worker.secret"}[left]
    (folder / gone).unlink()
    before = (folder / left).read_bytes()
    with pytest.raises(ConfigError, match="is not overwritten"):
        new_keys(folder)
    assert (folder / left).read_bytes() == before
    assert not (folder / gone).exists()


def test_every_public_key_of_the_folder_is_accepted_and_the_own_one_in_any_case(folder: Path, tmp_path: Path) -> None:
    other = new_keys(tmp_path / "other")
    (folder / "next.public").write_bytes((tmp_path / "other/worker.public").read_bytes())
    (folder / "notes.txt").write_text("none of ours")
    own = show_keys(folder).fingerprint
    shown = {key.fingerprint: key.files for key in show_keys(folder).accepted}
    assert shown == {own: ["worker.public"], other.fingerprint: ["next.public"]}
    (folder / "worker.public").unlink()
    assert {key.fingerprint: key.files for key in show_keys(folder).accepted} == {
        own: [],
        other.fingerprint: ["next.public"],
    }
    security = channel_security(str(folder))
    assert (security.fingerprint, security.accepted) == (own, (own, other.fingerprint))
    assert not channel_security("").authenticated


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o660, 0o602])
def test_a_secret_that_others_may_use_is_refused_with_the_mend(folder: Path, mode: int) -> None:
    (folder / "worker.secret").chmod(mode)
    with pytest.raises(ConfigError, match=rf"others may use it \(mode {mode:04o}\): chmod 600 .*worker.secret") as told:
        read_keys(folder)
    assert secret_digits(folder) not in str(told.value)


@pytest.mark.parametrize(("mode", "allowed"), [(0o440, True), (0o444, False), (0o460, False), (0o400, True)])
def test_a_secret_of_another_user_may_be_read_by_a_group(
    folder: Path, monkeypatch: pytest.MonkeyPatch, mode: int, allowed: bool
) -> None:
    """So does Kubernetes mount one for a pod's fsGroup: root's file, of that group."""
    (folder / "worker.secret").chmod(mode)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    if allowed:
        read_keys(folder)
        return
    with pytest.raises(ConfigError, match="defaultMode 0440"):
        read_keys(folder)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("worker.secret", None, "cannot read .*worker.secret.*No such file"),
        ("worker.secret", "pdkv-control-secret 12", "is no key: expected one line"),
        ("worker.secret", "", "is no key"),
        ("worker.secret", "pdkv-control-public " + "ab" * 32, "is no key"),
        ("other.public", "pdkv-control-public " + "zz" * 32, "is no key"),
        ("other.public", "\xff\xfe", "is no key"),
        ("other.public", "pdkv-control-secret " + "ab" * 32, "holds a secret key, and whoever gets it"),
    ],
)
def test_what_is_no_key_is_refused_without_a_word_of_it(
    folder: Path, name: str, content: str | None, message: str
) -> None:
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_text(content)
    with pytest.raises(ConfigError, match=message) as told:
        read_keys(folder)
    assert "ab" * 32 not in str(told.value)


def test_a_folder_that_there_is_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--control-keys .*nowhere is no folder; `pdkv keys new DIR`"):
        read_keys(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write keys into"):
        new_keys(tmp_path / "file")


def test_the_rotation_that_is_documented_never_parts_two_steps(folder: Path, tmp_path: Path) -> None:
    """Its own commands, on files; that such keys let workers speak is tested where there are sockets."""
    text = (Path(__file__).parents[2] / "docs/deploy.md").read_text(encoding="utf-8")
    steps = re.findall(r"^\d\. (.*) and restart\.$", text.partition("**Rotation,")[2], re.MULTILINE)
    assert len(steps) == 3
    generations = [read_keys(folder)]
    for step in steps:
        for command in re.findall(r"`([^`]+)`", step):
            full = re.sub(r"^pdkv\b", f"{sys.executable} -m pdkv", command)
            subprocess.run(full, shell=True, check=True, cwd=tmp_path, capture_output=True)
        generations.append(read_keys(folder))
        one, two = generations[-2:]
        for this, other in ((one, two), (two, one), (two, two)):
            assert this.own in other.accepted
    first, last = generations[0], generations[-1]
    assert first.own not in last.accepted
    assert last.accepted == (last.own,)
