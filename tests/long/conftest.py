"""Tests that take minutes: ``make test-long``; CI has no time for them."""

from pathlib import Path

import pytest

from pdkv.verify.link_chasing_checkpoint import write_checkpoint


@pytest.fixture(scope="session")
def link_chasing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return directory
