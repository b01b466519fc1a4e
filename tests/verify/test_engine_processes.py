"""Two engine processes as a deployment has them, spoken to without fronts."""

from pathlib import Path

import msgspec
import pytest

from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import PdkvError
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.link_chasing_checkpoint import write_checkpoint

LENGTH, NUM_TOKENS = 300, 12


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("processes") / "checkpoint"
    write_checkpoint(directory)
    return directory


def test_answers_with_state_that_travelled_between_processes(checkpoint: Path) -> None:
    prompt = make_prompt(3, LENGTH)
    plain = worker_settings("prefill", checkpoint, LENGTH + NUM_TOKENS, 0, 128)
    prefill = msgspec.structs.replace(plain, transport="auto", num_threads=1)
    with ProcessPair(prefill, msgspec.structs.replace(prefill, role="decode", name="verify-decode")) as pair:
        for _ in range(2):
            answer = pair.ask(prompt.token_ids, NUM_TOKENS)
            assert answer.token_ids == prompt.expected(NUM_TOKENS)
            assert (answer.report.num_pages, answer.report.path) == (3, "shm")


def test_says_why_one_cannot_start(checkpoint: Path) -> None:
    good = worker_settings("prefill", checkpoint, LENGTH, 0, 128)
    bad = msgspec.structs.replace(good, transport="auto", num_pages=1)
    with pytest.raises(PdkvError, match="--num-pages 1 cannot hold one request"):
        ProcessPair(bad, bad)
