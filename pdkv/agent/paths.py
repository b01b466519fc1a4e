"""What carries bytes between two workers: which path is worse than which, and the least that is good enough."""

from collections.abc import Iterable

import msgspec

_WORST_FIRST = ("unknown", "tcp", "shm", "rdma", "cuda_ipc", "inproc")
_BEST_FIRST = ("cuda_ipc", "rdma", "shm", "tcp")
"""What ``--require-transport`` may name."""


def worst_path(paths: Iterable[str]) -> str:
    """The path that bounds a link of several endpoints; "unknown" for none."""
    return min(paths, key=lambda path: _WORST_FIRST.index(path) if path in _WORST_FIRST else 0, default="unknown")


class PathRequirement(msgspec.Struct, frozen=True):
    """``--require-transport``: the least path that is good enough, None for any."""

    least: str | None = None

    def allows(self, path: str) -> bool:
        if self.least is None or path == "inproc":
            return True
        return path in _BEST_FIRST and _BEST_FIRST.index(path) <= _BEST_FIRST.index(self.least)
