"""The smoke suite of ``pdkv verify``, whole: right as it is, every control caught, every region hung upon."""

import json
from pathlib import Path

from pdkv.verify.tampering import Kind
from tests.verify.test_suite import REGIONS, verify


def test_the_smoke_suite_over_fp8_and_reused_selections(tmp_path: Path) -> None:
    stored = ("--kv-dtype", "fp8", "--index-dtype", "fp8", "--index-topk-freq", "2")
    done = verify("--suite", "smoke", "--lengths", "3072", *stored, "--report", str(tmp_path / "r"))
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    regions = (*REGIONS, "k_scale", "v_scale")
    assert {c["mutation"] for c in report["controls"]} == {f"{kind}:{r}" for kind in Kind for r in regions}
    quiet = {c["mutation"] for c in report["controls"] if c["first_wrong_step"] is None}
    assert quiet == {"drop:k_scale", "drop:v_scale"}, "another prompt's scales make the needles no quieter"
    assert len(report["coverage"]) == 4 * 16 + 2


def test_the_smoke_suite_passes_and_catches_every_control(tmp_path: Path) -> None:
    done = verify("--suite", "smoke", "--report", str(tmp_path / "r"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: right" in done.stdout
    assert len(done.stdout.splitlines()) <= 40, "one screen"
    report = json.loads((tmp_path / "r" / "report.json").read_text())
    assert report["schema"] == "pdkv.verify/v1"
    assert {c["mutation"] for c in report["controls"]} == {f"{kind}:{r}" for kind in Kind for r in REGIONS}
    blind = [c for c in report["controls"] if c["mutation"].endswith("index_k")]
    assert {(c["beyond_blind_window"], c["first_wrong_step"] is not None) for c in blind} == {
        (False, False),
        (True, True),
    }
    assert len(report["coverage"]) == 2 * 16 + 3
    assert all(entry["steps"] > 0 for entry in report["coverage"])


def test_a_lost_scale_is_wrong_and_named() -> None:
    stored = ("--kv-dtype", "fp8", "--index-dtype", "fp8", "--index-topk-freq", "2")
    done = verify("--mutate", "zero:k_scale", "--lengths", "2177", *stored)
    assert done.returncode == 4, done.stdout + done.stderr
    assert "k_scale differs after the transfer in 16 layers and heads" in done.stdout
    assert "the answer is wrong from step" in done.stdout
