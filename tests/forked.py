"""Daemons forked off the server that has loaded what they need, in place of ``python -m``; and so are their engines."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from tests.forked_engine import fork_engines
from tests.forkserver import FORKED


class Forked:
    """As ``subprocess.Popen``, half a second of imports sooner. How a start as such goes is tested with ``pdkv up``,
    whose children are started in full."""

    def __init__(
        self,
        main: Callable[[], int | None],
        arguments: Sequence[str],
        environment: Mapping[str, str],
        output: Path | Connection,
    ) -> None:
        """``main`` runs with ``arguments`` behind the program's name. What it writes goes to the end of a file, or its
        standard error into a pipe."""
        self._process = FORKED.Process(target=_run, args=(main, tuple(arguments), dict(environment), output))
        self._process.start()
        assert self._process.pid is not None
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        """None as long as it runs; below 0: the signal that killed it."""
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Harmless for a process that has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(
    main: Callable[[], int | None], arguments: Sequence[str], environment: dict[str, str], output: Path | Connection
) -> None:
    """In the child, which ends with main's code."""
    if isinstance(output, Path):
        with output.open("ab") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
    else:
        os.dup2(output.fileno(), 2)
        output.close()
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [main.__module__, *arguments]
    fork_engines()
    sys.exit(main())
