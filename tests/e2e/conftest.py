"""One running deployment for all end-to-end tests: they run in one group, wherever the others run."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from tests.e2e.deployment import LONG, Process, Trio, ask, running, trio, up, wait_until


@pytest.fixture(scope="session")
def link_chasing_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "link-chasing"
    write_checkpoint(directory)
    return directory


@pytest.fixture(scope="session")
def deployment(link_chasing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """``pdkv up`` with one prefill and one decode worker on the link-chasing checkpoint."""
    process = up(link_chasing_model, tmp_path_factory.mktemp("up"), "--max-model-len", "8192")
    with running(process):
        yield process


@pytest.fixture(scope="session")
def three(link_chasing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """Separate prefill, decode and router processes, for tests that look into workers without harming them."""
    with trio(
        link_chasing_model, tmp_path_factory.mktemp("trio"), "--max-model-len", "8192", "--lease-ttl", "30"
    ) as processes:
        yield processes


@pytest.fixture(scope="session")
def long_answer(three: Trio) -> httpx.Response:
    """24 tokens behind the 3,400 of ``make_prompt(5, LONG)``, answered while nothing else ran."""
    wait_until(lambda: three.prefill.holds_nothing() and three.decode.holds_nothing(), "unfragmented pools")
    return ask(three.router.url, make_prompt(5, LONG).token_ids, 24)
