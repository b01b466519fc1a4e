"""Workers of several rank processes over UCX: a right answer, and a worker that ends cleanly, and says why, when one
of its ranks dies or hangs.

The tests stand in the order in which they wear the deployment out: the last two each end a worker for good.
"""

import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from pdkv.daemons import worker_api
from pdkv.daemons.control_keys import new_keys
from pdkv.verify.link_chasing import make_prompt
from tests.commands import pdkv
from tests.e2e.deployment import (
    END_S,
    Process,
    Trio,
    ask,
    descendants,
    router,
    token_ids,
    transfer_facts,
    wait_ready,
    wait_until,
    worker,
)
from tests.http import HTTP

FLAGS = ("--max-model-len", "4096", "--lease-ttl", "5", "--stall-timeout", "6")


@pytest.fixture(scope="module")
def ranked(link_chasing_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trio]:
    """P with two ranks, D with four, a key of their own each, and a router."""
    folder = tmp_path_factory.mktemp("ranks")
    own = dict(zip(("prefill", "decode"), _a_key_each(folder / "p", folder / "d"), strict=True))
    ranks = {"prefill": ("--tp", "2", "--prefill-chunk", "64"), "decode": ("--tp", "4", "--verify-pages", "full")}
    prefill, decode = (worker(role, link_chasing_model, folder, *FLAGS, *own[role], *ranks[role]) for role in own)
    front = router(folder, [prefill], [decode], "--poll-interval", "0.2")
    with ExitStack() as stack:
        for process in (prefill, decode, front):
            process.start()
            stack.callback(process.end)
        for process in (prefill, decode, front):
            wait_ready(process)
        yield Trio(prefill, decode, front)


def _a_key_each(one: Path, two: Path) -> Iterator[tuple[str, str]]:
    """Flags for two workers that accept each other."""
    new_keys(one)
    new_keys(two)
    for own, other in ((one, two), (two, one)):
        shutil.copy(other / "worker.public", own / "other.public")
        yield "--control-keys", str(own)


def ranks_of(process: Process) -> list[int]:
    """Process ids of a worker's ranks other than 0, in order: they are the engine process's children."""
    assert process.popen is not None
    (engine,) = _children(process.popen.pid)
    return sorted(_children(engine))


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def exists(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def expect_end(process: Process, below: set[int], rank: int, size: int) -> None:
    """The worker ends by itself, says which rank was lost and how, and leaves nothing behind."""
    assert process.popen is not None
    assert process.popen.wait(END_S) not in (0, None)
    wait_until(lambda: not any(map(exists, below)), "no process of the worker is left")
    assert f"rank {rank} of this worker's {size} was killed by SIGKILL" in process.log.read_text()


def test_two_ranks_to_four(ranked: Trio) -> None:
    prompt = make_prompt(7, 3000)
    answer = ask(ranked.router.url, prompt.token_ids, 16)
    assert token_ids(answer) == list(prompt.expected(16))
    facts = transfer_facts(answer)
    assert (facts["num_pages"], facts["path"]) == (24, "shm")
    bytes_per_token = int(ranked.decode.info()["bytes_per_token"])  # type: ignore[call-overload]
    assert sum(facts["bytes_by_region"].values()) == 4 * 24 * 128 * bytes_per_token
    in_groups = 4 * 4 * 4 * 2  # ranks, pages of the last chunk, layer groups; a head and the index
    assert facts["num_spans"] <= 20 * (4 + 2) + in_groups
    assert [process.info()["tp_size"] for process in (ranked.prefill, ranked.decode)] == [2, 4]
    (told,) = [name for name in ranked.decode.metrics() if name.startswith("pdkv_engine_info")]
    assert "tp_size=4" in told
    checked = ranked.decode.metrics()
    # Four layers and heads, and the index keys of three layers on each rank.
    for region, each in (("k", 4 * 4), ("v", 4 * 4), ("index_k", 4 * 3)):
        assert checked[f"pdkv_kv_digest_checks_total{{region={region},result=ok}}"] == 24 * each
        assert checked[f"pdkv_kv_digest_checks_total{{region={region},result=mismatch}}"] == 0
    wait_until(lambda: ranked.prefill.holds_nothing() and ranked.decode.holds_nothing(), "pages back")


def test_their_channel_is_encrypted_and_each_says_so(ranked: Trio) -> None:
    """The test before has shown that transfers pass; here, that workers tell by which keys."""
    infos = [process.info() for process in (ranked.prefill, ranked.decode)]
    assert infos[0]["accepted_keys"] == list(reversed(infos[1]["accepted_keys"]))  # type: ignore[call-overload]
    for process, info in zip((ranked.prefill, ranked.decode), infos, strict=True):
        own, other = info["accepted_keys"]  # type: ignore[misc]
        assert f"encrypted, key {own}, also accepts {other}" in pdkv("describe", process.url).stdout
        refused = {name: value for name, value in process.metrics().items() if "control_refused" in name}
        assert refused
        assert not any(refused.values())


def test_a_decode_worker_without_keys_is_kept_out_and_its_client_told_why(ranked: Trio, three: Trio) -> None:
    info = ranked.prefill.info()
    headers = {
        worker_api.TRANSFER: "ab" * 16,
        worker_api.DEADLINE: "30",
        worker_api.PREFILL_CONTROL: str(info["control"]),
        worker_api.PREFILL_INCARNATION: str(info["incarnation"]),
    }
    body = {"prompt": [1, 2, 3], "max_tokens": 2}
    answer = HTTP.post(f"{three.decode.url}/v1/completions", json=body, headers=headers, timeout=60)
    assert answer.status_code == 502, answer.text
    assert answer.json()["error"]["code"] == "keys"
    assert "speaks only with keys, and this worker has none" in answer.json()["error"]["message"]
    assert three.decode.metrics()["pdkv_control_refused_total{reason=without_keys}"] == 1
    assert "control channel refused: peer at" in three.decode.log.read_text()

    def noticed() -> bool:
        found = ranked.prefill.metrics()
        return any(found[f"pdkv_control_refused_total{{reason={r}}}"] for r in ("peer_without_keys", "broken_off"))

    wait_until(noticed, "prefill has counted it too")
    assert "control channel refused: a " in ranked.prefill.log.read_text()


def test_the_doctor_needs_the_keys_too(ranked: Trio, link_chasing_model: Path) -> None:
    ask_it = ("doctor", "--model", str(link_chasing_model), "--peer", ranked.prefill.url, "--max-model-len", "4096")
    kept_out = pdkv(*ask_it)
    assert kept_out.returncode == 3
    assert "speaks only with keys, and this worker has none" in kept_out.stdout
    assert "control-channel  not encrypted" in kept_out.stdout
    keys = ranked.decode.arguments[ranked.decode.arguments.index("--control-keys") + 1]
    let_in = pdkv(*ask_it, PDKV_CONTROL_KEYS=keys)
    assert let_in.returncode == 0, let_in.stdout
    assert "control-channel  encrypted, key" in let_in.stdout


def test_a_rank_that_hangs_shows_in_liveness(ranked: Trio) -> None:
    pid = ranks_of(ranked.decode)[1]
    livez = f"{ranked.decode.admin_url}/livez"
    assert HTTP.get(livez).status_code == 200
    os.kill(pid, signal.SIGSTOP)
    try:
        wait_until(lambda: HTTP.get(livez).status_code == 503, "liveness fails")
    finally:
        os.kill(pid, signal.SIGCONT)
    wait_until(lambda: HTTP.get(livez).status_code == 200, "it lives again")
    wait_until(lambda: ranked.router.health() == 200, "the router sends it requests again")


def test_a_rank_killed_in_mid_step_ends_the_request_with_an_error(ranked: Trio) -> None:
    assert ranked.prefill.popen is not None
    below = descendants(ranked.prefill.popen.pid)
    prompt = make_prompt(9, 4000)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(ask, ranked.router.url, prompt.token_ids, 8, timeout_s=120)
        wait_until(lambda: ranked.prefill.status()["requests_running"] == 1 or asking.done(), "it computes")
        assert not asking.done(), asking.result().text
        os.kill(ranks_of(ranked.prefill)[0], signal.SIGKILL)
        answer = asking.result()
    assert answer.status_code >= 500, answer.text
    assert answer.json()["error"]["message"]
    expect_end(ranked.prefill, below, rank=1, size=2)
    wait_until(ranked.decode.holds_nothing, "decode has its pages back")


def test_a_rank_killed_while_idle_takes_its_worker_down(ranked: Trio) -> None:
    assert ranked.decode.popen is not None
    below = descendants(ranked.decode.popen.pid)
    assert len(below) == 4
    os.kill(ranks_of(ranked.decode)[2], signal.SIGKILL)
    expect_end(ranked.decode, below, rank=3, size=4)
