"""Runs child processes: prefixes what they print, starts the dead anew, and leaves none behind."""

import asyncio
import contextlib
import os
import signal
import time
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from typing import NamedTuple

import structlog

from pdkv.daemons import lifeline
from pdkv.errors import PdkvError

_FRONT_GRACE_S = 4.0
_TERM_GRACE_S = 8.0
"""Between SIGTERM and SIGKILL: of the last child on top of its drain, and of the others; together well below 30 s."""
_FIRST_BACKOFF_S = 1.0
_LONGEST_BACKOFF_S = 30.0
_HEALTHY_S = 60.0
"""A child that lived this long starts anew with the first backoff."""
_log = structlog.get_logger(__name__)


class StartFailedError(PdkvError):
    """A child died before all were ready; its own messages say why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("a process of the deployment ended during the start; its messages above say why")
        self.exit_code = exit_code


class ChildSpec(NamedTuple):
    name: str
    args: tuple[str, ...]
    """Behind ``python -m pdkv``."""
    env: tuple[tuple[str, str], ...] = ()
    """Variables of its own, beside those of all children."""


class Supervisor:
    """Children that are kept alive while ``running``. Lives on the main thread's event loop."""

    def __init__(
        self,
        specs: list[ChildSpec],
        env: Mapping[str, str],
        *,
        restart: bool,
        drain_s: float,
        print_line: Callable[[str], None],
    ) -> None:
        """``drain_s``: seconds that the last child, which stands in front of the others, is given to drain."""
        self._specs = specs
        self._env = dict(env)
        self._restart = restart
        self._drain_s = drain_s
        self._print_line = print_line
        self._processes: dict[str, Process] = {}
        self._stopping = False
        self._settled = False
        self._failed: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all children; on leaving, end them all: by SIGTERM, and what does not heed it by SIGKILL.

        A cancellation while they are being ended kills them all at once.
        """
        tasks = [asyncio.create_task(self._keep(spec)) for spec in self._specs]
        try:
            yield
        finally:
            await self._end_all()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def settled_after(self, ready: Coroutine[None, None, None]) -> None:
        """Wait until ``ready`` returns. From then on a child that dies is started anew; before, the first death is the
        failure of all, and raises ``StartFailedError``."""
        waiting = asyncio.create_task(ready)
        try:
            await asyncio.wait((self._failed, waiting), return_when=asyncio.FIRST_COMPLETED)
            if self._failed.done():
                raise StartFailedError(self._failed.result())
            await waiting
            self._settled = True
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)

    def pid(self, name: str) -> int:
        """Of a child that was started."""
        return self._processes[name].pid

    async def _keep(self, spec: ChildSpec) -> None:
        backoff = _FIRST_BACKOFF_S
        while not self._stopping:
            started = time.monotonic()
            code = await self._run(spec)
            if self._stopping:
                return
            how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
            if not self._settled:
                _log.error("died during the start", child=spec.name, how=how)
                if not self._failed.done():
                    self._failed.set_result(code if code > 0 else 1)
                return
            if not self._restart:
                _log.error("died; restarts are switched off", child=spec.name, how=how)
                return
            backoff = _FIRST_BACKOFF_S if time.monotonic() - started > _HEALTHY_S else backoff
            _log.error("died; starting it anew", child=spec.name, how=how, in_s=backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, _LONGEST_BACKOFF_S)

    async def _run(self, spec: ChildSpec) -> int:
        process = await asyncio.create_subprocess_exec(
            *lifeline.command("pdkv", *spec.args),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=PIPE,
            stderr=STDOUT,
            env={**self._env, **dict(spec.env)},
            start_new_session=True,  # the terminal's Ctrl-C is for us alone, and the group can be killed as one
        )
        self._processes[spec.name] = process
        _log.debug("started", child=spec.name, pid=process.pid)
        if self._stopping:  # the end came while the child was being made
            _signal(process, signal.SIGTERM)
        printing = asyncio.create_task(self._print(spec.name, process))
        code = await process.wait()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1.0):
                await printing
        return code

    async def _print(self, name: str, process: Process) -> None:
        assert process.stdout is not None, "it was opened as a pipe"
        partial = b""
        while chunk := await process.stdout.read(1 << 16):
            *lines, partial = (partial + chunk).split(b"\n")
            for line in lines:
                self._print_line(f"[{name}] {line.decode('utf-8', 'replace')}")
        if partial:
            self._print_line(f"[{name}] {partial.decode('utf-8', 'replace')}")

    async def _end_all(self) -> None:
        """The last child first and alone: it stands in front of the others and tells its clients."""
        self._stopping = True
        names = [spec.name for spec in self._specs if spec.name in self._processes]
        try:
            await self._end(names[-1:], self._drain_s + _FRONT_GRACE_S)
            await self._end(names, _TERM_GRACE_S)
        except asyncio.CancelledError:
            await self._end(names, 0)
            raise

    async def _end(self, names: list[str], grace_s: float) -> None:
        waits = [asyncio.create_task(self._processes[name].wait()) for name in names]
        if not waits:
            return
        for name in names:
            _signal(self._processes[name], signal.SIGTERM)
        if grace_s:
            await asyncio.wait(waits, timeout=grace_s)
        for name in names:
            process = self._processes[name]
            if process.returncode is None:
                _log.warning("does not end; killing it", child=name, pid=process.pid)
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        await asyncio.wait(waits)


def _signal(process: Process, number: signal.Signals) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(number)
