"""The spans that are raced are those of the released model."""

import numpy as np
import pytest

from pdkv.bench.geometry import Spans, Workload, memory_bytes
from pdkv.errors import ConfigError


def covered(offset, length, size):
    """How often each byte is touched."""
    edges = np.zeros(size + 1, dtype=np.int64)
    np.add.at(edges, offset, 1)
    np.add.at(edges, offset + length, -1)
    return np.cumsum(edges)[:-1]


@pytest.mark.parametrize(
    ("workload", "row", "spans_per_page"),
    [
        (Workload(256, tp=4), 2_961_408, 297),
        (Workload(256, tp=1), 9_043_968, 297 + 3 * 240),
        (Workload(200, tp=4, kv_dtype="bfloat16", index_dtype="bfloat16"), 5_799_936, 177),
    ],
)
def test_every_byte_of_every_page_moves_once(workload, row, spans_per_page):
    for layout, spans_of_a_page in (("arena", 1), ("per-layer", spans_per_page)):
        spans = Spans.of(workload, layout)
        assert spans.num_bytes == 2 * row == memory_bytes(workload)
        # Heads of one tensor's page are adjacent, so that the planner merges them again.
        assert spans.length.size in (2 * spans_of_a_page, 2 * 297)
        for offsets in (spans.remote, spans.local):
            assert (covered(offsets, spans.length, memory_bytes(workload)) == 1).all()


def test_pages_are_scattered_on_both_sides():
    spans = Spans.of(Workload(128 * 64), "arena")
    assert spans.length.size == 64, "no two pages happen to make one run"
    assert (np.diff(spans.remote) != 2_961_408).any()


@pytest.mark.parametrize("workload", [Workload(0), Workload(128, tp=3)])
def test_refuses_what_there_is_not(workload):
    with pytest.raises(ConfigError):
        Spans.of(workload, "arena")
    with pytest.raises(ConfigError, match="layout 'rows'"):
        Spans.of(Workload(128), "rows")
