"""Two engine processes as a deployment has them, spoken to without fronts."""

from pathlib import Path

import msgspec
import pytest

from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import PdkvError
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint
from pdkv.verify.undivided import complete
from tests.transport.test_nixl import needs_nixl

LENGTH, NUM_TOKENS = 300, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes") / "checkpoint"
    write_checkpoint(directory)
    return directory


@pytest.mark.parametrize(
    ("transport", "ucx_tls", "path"),
    [("auto", None, "shm"), pytest.param("nixl", "tcp", "tcp", marks=needs_nixl)],
)
def test_answers_with_state_that_travelled_between_processes(
    checkpoint: Path, transport: str, ucx_tls: str | None, path: str
) -> None:
    prompt = make_prompt(3, LENGTH)
    plain = worker_settings("prefill", checkpoint, LENGTH + NUM_TOKENS, 0, 128)
    prefill = msgspec.structs.replace(plain, transport=transport, ucx_tls=ucx_tls, num_threads=1)
    undivided = complete(checkpoint, prompt.token_ids, NUM_TOKENS, ignore_eos=True).token_ids
    with ProcessPair(prefill, msgspec.structs.replace(prefill, role="decode", name="verify-decode")) as pair:
        for _ in range(2):
            answer = pair.ask(prompt.token_ids, NUM_TOKENS)
            assert answer.token_ids == undivided == prompt.expected(NUM_TOKENS)
            assert (answer.report.num_pages, answer.report.path) == (3, path)


def test_says_why_one_cannot_start(checkpoint: Path) -> None:
    good = worker_settings("prefill", checkpoint, LENGTH, 0, 128)
    bad = msgspec.structs.replace(good, transport="auto", num_pages=1)
    with pytest.raises(PdkvError, match="--num-pages 1 cannot hold one request"):
        ProcessPair(bad, bad)
