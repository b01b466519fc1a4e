"""Where other movers come from: an environment of their own (``make bench-tools``), never a dependency of pdkv."""

import os
from pathlib import Path

from pdkv.bench.lane import Launch

RIVALS = ("nixl", "mooncake", "ucx")
"""What ``--vs`` may name; ucx is pdkv's own over UCX."""

GPU_PATH = "cuda_ipc"

_FOREIGN = ("nixl", "mooncake")

_UCX = {
    # Without error handling NIXL's UCX refuses these transports; it is the fastest list of those that work.
    "shm": {"UCX_TLS": "posix,sysv,cma,self", "UCX_MM_ERROR_HANDLING": "y"},
    "tcp": {"UCX_TLS": "tcp"},
    GPU_PATH: {},  # it finds the best by itself; what little a list changes is its own affair
}
"""What the UCX inside NIXL may use, so that it travels by the path that is raced."""

_OPERATIONS = {
    ("nixl", "shm"): ("read", "write"),
    ("nixl", "tcp"): ("read", "write"),
    ("mooncake", "tcp"): ("read", "write"),
    ("mooncake", "shm"): (),
    ("nixl", GPU_PATH): ("read", "write"),
    ("mooncake", GPU_PATH): (),
}


class NotInstalledError(Exception):
    """A contestant whose tools are not there; the message says how to get them."""


def operations_of(name: str, path: str) -> tuple[str, ...]:
    """What the contestant can do over a path; empty = nothing."""
    return _OPERATIONS.get((name, path), ("read",))


def launch_of(name: str, path: str, tools: Path) -> Launch:
    """Raises ``NotInstalledError``."""
    if name not in _FOREIGN:
        return Launch()
    python = tools / "bin/python"
    if not python.exists():
        raise NotInstalledError(f"there is no {python}; run `make bench-tools`, or name its folder with --tools")
    libraries = [str(folder) for folder in sorted((tools / "debian").glob("**/x86_64-linux-gnu"))]
    found = os.pathsep.join(filter(None, [*libraries, os.environ.get("LD_LIBRARY_PATH", "")]))
    environment = {"LD_LIBRARY_PATH": found, "MC_LOG_LEVEL": "ERROR", "GLOG_minloglevel": "2"}
    if name == "nixl":
        environment |= {**_UCX[path], "NIXL_LOG_LEVEL": "ERROR"}
    return Launch(python=str(python), environment=environment)
