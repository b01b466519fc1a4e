"""Keys of clients: what a file may hold, who is admitted, and what happens when the file changes."""

import os
from pathlib import Path

import pytest

from pdkv.daemons.api_keys import ApiKeys
from pdkv.errors import ConfigError

ONE, OTHER = "sk-one-0123456789", "sk-other-0123456789"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "keys"
    path.write_text(f"# of the front end\n{ONE}\n\n  {OTHER}  \n")
    return path


@pytest.mark.parametrize(
    ("authorization", "admitted"),
    [
        (f"Bearer {ONE}", True),
        (f"bearer {OTHER}", True),
        (f"Bearer  {ONE} ", True),
        ("", False),
        ("Bearer", False),
        ("Bearer ", False),
        (ONE, False),
        (f"Basic {ONE}", False),
        (f"Bearer {ONE[:-1]}", False),
        (f"Bearer {ONE}{ONE}", False),
        ("Bearer # of the front end", False),
        ("Bearer \xfc\xdf", False),
    ],
)
def test_who_names_a_key_is_admitted(file: Path, authorization: str, admitted: bool):
    assert ApiKeys(file).admits(authorization) is admitted


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "holds no key"),
        (b"# none yet\n\n", "holds no key"),
        (b"# short\n\nsk-0123456789\n", "line 3 .*at least 16"),
        (b"sk-one-0123456789 sk-other-0123456789\n", "line 1 .*one word"),
        ("sk-ön-0123456789xyz\n".encode(), "line 1 .*ASCII"),
        (b"\xff\xfe", "is no text"),
    ],
)
def test_a_file_without_good_keys_is_refused_at_start(tmp_path: Path, content: bytes, problem: str):
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=problem) as refused:
        ApiKeys(path)
    assert "0123456789" not in str(refused.value), "what is told is not the key"


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir()])
def test_a_file_that_cannot_be_read_is_refused_at_start(tmp_path: Path, make):
    make(tmp_path / "keys")
    with pytest.raises(ConfigError, match="cannot read the API keys"):
        ApiKeys(tmp_path / "keys")


def test_keys_come_and_go_with_the_file(file: Path):
    keys = ApiKeys(file)
    successor = file.with_name("new")
    successor.write_text("sk-third-0123456789\n")
    os.replace(successor, file)  # as a Secret's volume does
    assert keys.admits("Bearer sk-third-0123456789")
    assert not keys.admits(f"Bearer {ONE}")


@pytest.mark.parametrize("spoil", [os.remove, lambda path: Path(path).write_text("")])
def test_keys_stay_while_the_file_is_none(file: Path, spoil, caplog: pytest.LogCaptureFixture):
    keys = ApiKeys(file)
    spoil(file)
    assert keys.admits(f"Bearer {ONE}")
    assert keys.admits(f"Bearer {OTHER}")
    file.write_text("sk-third-0123456789\n")
    assert keys.admits("Bearer sk-third-0123456789")
    assert not keys.admits(f"Bearer {ONE}")
