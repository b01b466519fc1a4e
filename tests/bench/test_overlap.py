"""The overlap bench end to end: a deployment, a prompt twice, hops; what is counted adds up."""

import msgspec
import pytest

from pdkv.bench.overlap import OverlapReport, table
from tests.cli.test_bench import pdkv


def test_a_long_prompt_is_hidden_and_hops_are_timed() -> None:
    done = pdkv("overlap", "--tokens", "1024", "--prefill-chunk", "256", "--short", "2", "--json")
    assert done.returncode == 0, done.stderr
    report = msgspec.json.decode(done.stdout, type=OverlapReport)
    (move,) = report.moves
    assert move.right
    assert report.path == "tcp"
    assert move.num_bytes > 1024 * 4 * 4 * 2 * 128 * 4
    assert move.alone_s > 0
    assert 0 <= move.hidden_fraction <= 1
    assert report.exposed_share == move.exposed_s / move.alone_s
    assert report.hops is not None
    assert report.hops.requests == 2
    hops = report.hops
    assert min(hops.granted_ms, hops.posted_ms, hops.first_step_ms, hops.prefill_ms, hops.undivided_ms) > 0
    assert hops.right  # of the undivided worker too
    assert hops.added_p10_ms <= hops.added_ms <= hops.added_p90_ms
    assert hops.added_low_ms <= hops.added_ms <= hops.added_high_ms
    parts = hops.client_ms + hops.router_ms + hops.workers_ms
    assert parts == pytest.approx(hops.control_ms, abs=0.01)
    assert "added" in table(report)
    assert "right" in table(report)
