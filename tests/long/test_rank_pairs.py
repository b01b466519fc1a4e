"""Every pair of rank counts, and deployments of rank processes whose tokens must be transformers'."""

import itertools
import os
import re
import signal
from pathlib import Path

import pytest

from pdkv.m3.model import load_model
from pdkv.verify.equality import combine, compare_tokens
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.pair import DividedPair
from pdkv.verify.undivided import complete_with
from tests.checkpoints import Oracle, OracleCase, write_random_checkpoint
from tests.e2e.deployment import ask, descendants, running, token_ids, up, wait_until

LENGTH, NUM_TOKENS = 3000, 12


@pytest.fixture(scope="module")
def unseen_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "random-m3"
    write_random_checkpoint(directory, 5)
    return directory


@pytest.fixture(scope="module")
def case(unseen_model: Path) -> OracleCase:
    return Oracle(unseen_model).case(LENGTH, NUM_TOKENS, seed=3)


@pytest.mark.parametrize(("prefill", "decode"), list(itertools.product((1, 2, 4, 8), repeat=2)))
def test_every_pair_answers_as_the_undivided_engine(prefill: int, decode: int, link_chasing_model: Path) -> None:
    prompt = make_prompt(10 * prefill + decode, LENGTH)
    with DividedPair(link_chasing_model, LENGTH + 24, prefill_tp=prefill, decode_tp=decode) as pair:
        answer = pair.ask(prompt.token_ids, 24)
    assert answer.token_ids == prompt.expected(24)
    undivided = complete_with(load_model(link_chasing_model), prompt.token_ids, 24, ignore_eos=True)
    assert answer.token_ids == undivided.token_ids


@pytest.mark.parametrize(("prefill", "decode"), [(1, 2), (2, 1), (2, 4), (4, 1)])
def test_rank_processes_answer_as_transformers(
    prefill: int, decode: int, unseen_model: Path, case: OracleCase, tmp_path: Path
) -> None:
    flags = ("--max-model-len", "4096", "--max-batch", "2", "--prefill-chunk", "333")
    ranks = ("--prefill-tp", str(prefill), "--decode-tp", str(decode), "--dtype", "float32")
    with running(up(unseen_model, tmp_path, *flags, *ranks)) as process:
        tokens = token_ids(ask(process.url, case.prompt, NUM_TOKENS))
    verdict = combine([compare_tokens(tokens, case.tokens, case.logits)])
    print(f"{prefill} -> {decode}: {verdict}")  # noqa: T201  what the equality rule excuses must be reported
    assert verdict.equal, verdict.problems


def test_up_starts_a_worker_anew_that_lost_a_rank(link_chasing_model: Path, tmp_path: Path) -> None:
    flags = ("--max-model-len", "4096", "--max-batch", "2", "--prefill-tp", "2", "--decode-tp", "4")
    prompt = make_prompt(3, LENGTH)
    process = up(link_chasing_model, tmp_path, *flags)
    with running(process):
        assert token_ids(ask(process.url, prompt.token_ids, 8)) == list(prompt.expected(8))
        for role in ("prefill", "decode"):
            os.kill(_a_rank_of(process.popen.pid, role), signal.SIGKILL)  # type: ignore[union-attr]
            wait_until(lambda: process.health() == 503, "the router notices")
            wait_until(lambda: process.health() == 200, "the worker is back", 90)
            assert token_ids(ask(process.url, prompt.token_ids, 8)) == list(prompt.expected(8))
        killed = re.findall(r"rank \d of this worker's \d was killed by SIGKILL", process.log.read_text())
        assert len(set(killed)) == 2


def _a_rank_of(top: int, role: str) -> int:
    """The last rank of the worker of this role below a ``pdkv up``: its front's only child's youngest child."""
    for pid in descendants(top):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if words[1:4] == [b"-m", b"pdkv", role.encode()]:
            (engine,) = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
            return max(map(int, Path(f"/proc/{engine}/task/{engine}/children").read_text().split()))
    raise AssertionError(f"no {role} below {top}")
