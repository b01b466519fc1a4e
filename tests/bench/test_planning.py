"""Planning as it is measured: merged where layouts allow, and pools that still give runs after much use."""

from pdkv.bench import planning
from pdkv.bench.geometry import Workload


def test_rows_and_tensors():
    report = planning.measure(Workload(128 * 16), requests=50)
    arena, tensors = report.costs
    assert (arena.raw_spans, arena.spans) == (16 * 297, 16)
    assert (tensors.raw_spans, tensors.spans) == (16 * 297, 16 * 297)
    assert arena.plan_ms >= 0


def test_pools_keep_runs_through_churn():
    """Random pages would be as many spans as pages."""
    used = planning.churn(Workload(128 * 64), requests=2_000)
    assert 16 < used.pages_per_transfer < 64
    assert used.spans_per_transfer < used.pages_per_transfer / 4
