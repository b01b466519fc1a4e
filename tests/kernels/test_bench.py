"""What the bench of the kernels says without a GPU: goals, outcomes of parity, tables."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "kernels"))  # the bench is a script, and no package

from benchmarks import parity, registry, report
from benchmarks.timing import Goal, Rates, Result

FILE = "tests/kernels/test_kv_store_triton.py"
RATES = Rates(read=4.5e12, copy=4.2e12, bf16=7e14, fp8=1.2e15)
SETTING = {"device": "a GPU", "driver": "1", "torch": "2", "triton": "3", "revision": "r", "date": "d", "command": "c"}


def result(time_s: float, asked_s: float | None) -> Result:
    return Result("kv_store", "some rows", time_s, 0.5, 1e12, 0.0, 3e-5, 1.5, asked_s, 2e-5, "a note")


@pytest.mark.parametrize(
    ("goal", "rival", "asked"),
    [
        (Goal(ratio=2.0), 30.0, 15.0),
        (Goal(ratio=2.0), None, None),
        (Goal(share=0.5), None, 20.0),
        (Goal(ratio=2.0, share=0.5), 30.0, 20.0),
        (Goal(ratio=1.2, share=0.5), 30.0, 25.0),
        (Goal(ratio=2.0, share=0.5), None, None),
    ],
)
def test_a_goal_allows_the_longer_of_its_two_times(goal: Goal, rival: float | None, asked: float | None):
    assert goal.seconds(10.0, rival) == (None if asked is None else pytest.approx(asked))


def test_tables_mark_what_takes_longer_than_asked():
    table = report.markdown(SETTING, RATES, [result(2e-5, 1.5e-5), result(1e-5, 1.5e-5), result(1e-5, None)])
    assert "### kv_store" in table
    assert table.count("**15.0**") == 1
    assert table.count("| 15.0 |") == 1
    assert [report.line(result(t, 1.5e-5)).count("15.0!") for t in (2e-5, 1e-5)] == [1, 0]


@pytest.mark.parametrize(
    ("output", "green"),
    [
        (f"[gw1] [ 10%] PASSED {FILE}::test_a[x] \n{FILE}::test_b PASSED [ 20%]\n", True),
        (f"{FILE}::test_a PASSED\n[gw0] [ 10%] FAILED {FILE}::test_b[PASSED] \n", False),
        (f"{FILE}::test_a SKIPPED (needs an NVIDIA GPU)\n", False),
        (f"{FILE}::test_a PASSED\nworker 'gw0' crashed while running '{FILE}::test_b'\n", False),
        ("tests/kernels/test_other.py::test_a PASSED\n", False),
        ("", False),
    ],
)
def test_only_files_of_which_all_that_ran_passed_are_green(output: str, green: bool):
    assert parity.is_green(output, FILE) is green


def test_what_pytest_says_is_kept_and_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In pytest's place stands a program that says what pytest would: no GPU test runs here."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f"#!/bin/sh\necho '{FILE}::test_a PASSED'\necho '= FAILURES ='; echo 'x.py::test_b FAILED'\n")
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    outcome = parity.run([FILE, "x.py"], tmp_path / "log")
    assert outcome.green == {FILE: True, "x.py": False}
    assert outcome.details == "= FAILURES =\nx.py::test_b FAILED\n"
    assert outcome.summary == "x.py::test_b FAILED"
    assert parity.run([FILE], tmp_path / "log").details == ""


def test_outcomes_of_other_sources_are_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    kept = tmp_path / "checked.json"
    parity.write(parity.Outcome({FILE: True}, "1 passed", ""), kept)
    assert parity.read(kept) == {FILE: True}
    said = json.loads(kept.read_text())
    kept.write_text(json.dumps({**said, "sources": "others"}))
    with pytest.raises(SystemExit, match="sources"):
        parity.read(kept)
    with pytest.raises(SystemExit, match="holds no outcome"):
        parity.read(tmp_path / "missing.json")


@pytest.mark.parametrize("name", registry.OPERATIONS)
def test_every_operation_names_a_parity_test_that_there_is(name: str):
    assert all((parity.ROOT / test).is_file() for test in registry.find(name).TESTS)
