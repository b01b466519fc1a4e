"""What operations on one token alone are measured with: row counts, and torch's time for the same work."""

from collections.abc import Callable, Sequence

from benchmarks.timing import time_calls

HIDDEN = 6144
ROWS = [1, 64, 1024, 8192]


def eager_note(calls: Sequence[Callable[[], object]]) -> str:
    """Time of the reference's torch operations in a graph, so that launches do not count against them."""
    return f"torch in sequence {time_calls(calls) * 1e6:.1f} us"
