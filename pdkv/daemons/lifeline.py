"""Starts a Python module that the kernel kills as soon as the process that asked for it is gone.

``python -m pdkv.daemons.lifeline PARENT_PID MODULE ARGS...`` ties itself to its parent, then becomes the module. The
tie is made before anything heavy is imported and survives ``execv``, so not even SIGKILL of the parent leaves an
orphan. It belongs to the parent's *thread*: start children from the main thread.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def command(module: str, *args: str) -> list[str]:
    """The argument list that runs ``python -m module args`` as a child of the calling process, tied to its life."""
    return [sys.executable, "-m", "pdkv.daemons.lifeline", str(os.getpid()), module, *args]


def die_with_parent(parent_pid: int) -> None:
    """Ask the kernel for SIGKILL when the parent goes; ends this process at once when it has gone already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os._exit(1)


if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    os.execv(sys.executable, [sys.executable, "-m", *sys.argv[2:]])
