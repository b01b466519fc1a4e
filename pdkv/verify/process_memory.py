"""Peak memory of processes that run on this machine, from /proc."""

from pathlib import Path

_PROC = Path("/proc")


def tree_peaks(root: int) -> list[int]:
    """Peak resident bytes (VmHWM) of a process and all that it has below it, largest first.

    Pages that a process shares with the one it was forked from count for both. Processes that end meanwhile are left
    out.
    """
    below: dict[int, list[int]] = {}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal() and (parent := _parent(entry)) is not None:
            below.setdefault(parent, []).append(int(entry.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        waiting += below.get(pid, [])
        if (peak := _peak(_PROC / str(pid))) is not None:
            found.append(peak)
    return sorted(found, reverse=True)


def _parent(process: Path) -> int | None:
    try:  # the name, in brackets, may hold anything; state and parent come behind it
        return int((process / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])
    except (OSError, IndexError, ValueError):
        return None


def _peak(process: Path) -> int | None:
    try:
        for line in (process / "status").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None
