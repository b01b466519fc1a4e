"""``pdkv bench serve`` as a user runs it: both sides, and an end by Ctrl-C that leaves nothing behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.deployment import descendants, wait_until
from tests.soak import write_tiny_checkpoint

SMALL = ("--requests", "4", "--concurrency", "2", "--input-tokens", "300", "--output-tokens", "5")
COMMAND = (sys.executable, "-m", "pdkv", "bench", "serve", *SMALL)


@pytest.mark.parametrize("kind", ["demo", "tiny"])
def test_both_sides_answer_alike(kind: str, tmp_path: Path) -> None:
    model = ()
    if kind == "tiny":
        write_tiny_checkpoint(tmp_path / "tiny")
        model = ("--model", str(tmp_path / "tiny"))
    done = subprocess.run([*COMMAND, *model, "--json"], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["served"] == "1 prefill, 1 decode, auto"
    assert report["answers"]["compared"] == 4
    assert (report["answers"]["wrong"], report["answers"]["undecided"]) == ([], "")
    if kind == "tiny":
        assert [one["compared"] for one in report["answers"]["sides"]] == [4, 4]
        assert all(0 < one["deviation"] < 1e-3 for one in report["answers"]["sides"]), "log-probabilities were told"
        assert report["answers"]["rounding"]["tokens"] == 20
    divided, undivided = report["sides"]
    assert (divided["answered"], undivided["answered"]) == (4, 4)
    assert divided["paths"] == {"shm": 4}
    assert divided["exposed_ms"]["max"] >= 0
    for side in report["sides"]:
        assert 0 < side["ttft_ms"]["p50"] <= side["ttft_ms"]["p99"] <= side["total_ms"]["max"]


def test_ctrl_c_ends_all_that_it_started() -> None:
    command = [*COMMAND, "--verbose"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "answered" in line:
                break
        children = descendants(process.pid)
        assert len(children) >= 3
        os.killpg(process.pid, signal.SIGINT)
        process.stderr.read()
        assert process.wait(60) == 130
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children), "all children have ended")
