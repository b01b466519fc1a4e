"""``pdkv`` commands for tests: each in a process of its own, which a server that has loaded torch forks off."""

import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from subprocess import CompletedProcess

from pdkv.__main__ import main
from tests.forkserver import FORKED

DEADLINE_S = 250.0


def pdkv(*arguments: str, **environment: str) -> CompletedProcess[str]:
    """The command's end, and what it wrote; two seconds of imports sooner than ``python -m pdkv``. What a start as such
    does is tested where daemons are started."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = FORKED.Process(target=_run, args=(arguments, {**os.environ, **environment}, out, err))
        process.start()
        process.join(DEADLINE_S)
        if process.is_alive():
            process.kill()
            process.join()
        assert process.exitcode is not None
        return CompletedProcess(["pdkv", *arguments], process.exitcode, out.read_text(), err.read_text())


def _run(arguments: Sequence[str], environment: dict[str, str], out: Path, err: Path) -> None:
    """In the child, which ends with the command's code."""
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), stream.fileno())
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["pdkv", *arguments]
    main()
