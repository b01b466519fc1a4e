"""The engine on a GPU. Without one all of this is skipped, and says so."""

from pathlib import Path

import pytest
import torch

from pdkv.verify.link_chasing_checkpoint import write_checkpoint

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU: torch sees none")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            item.add_marker(missing)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("link-chasing") / "checkpoint"
    write_checkpoint(directory)
    return directory
