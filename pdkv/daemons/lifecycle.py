"""How a daemon ends: at a first signal it drains, at a second one, or when that takes too long, it stops at once.

Draining: new requests are refused, what runs goes on to its end, pages that a peer may read are kept until it lets go.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from typing import Any

import structlog

DRAIN_DEADLINE_EXIT_CODE = 7
_POLL_S = 0.05
_log = structlog.get_logger(__name__)


class Lifecycle:
    """Whether this process drains or stops, and its exit code. Belongs to the event loop's thread."""

    def __init__(self) -> None:
        self.draining = False
        self.exit_code = 0
        self._ending = asyncio.Event()
        self.ending_code = 0
        """What ``end`` was called with first."""
        self._stopped = asyncio.Event()

    def drain(self) -> None:
        """Take nothing new from now on. Idempotent; does not end the process."""
        if not self.draining:
            self.draining = True
            _log.info("draining")

    def end(self, exit_code: int) -> None:
        """Drain and then end with this exit code; called again, end at once."""
        if self._ending.is_set():
            self.stop(self.ending_code)
            return
        self.ending_code = exit_code
        self._ending.set()
        self.drain()

    def stop(self, exit_code: int) -> None:
        """End now. The first reason stands."""
        if not self._stopped.is_set():
            self.exit_code = exit_code
            self.draining = True
            self._stopped.set()

    async def wait(self) -> None:
        """Until it is time to end."""
        await self._stopped.wait()

    async def wait_for_end(self) -> None:
        """Until ``end`` or ``stop`` was called."""
        waits = [asyncio.create_task(event.wait()) for event in (self._ending, self._stopped)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM end the process, with the exit codes 130 and 143."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self.end, 128 + number)
        try:
            yield
        finally:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)

    async def stop_when_drained(self, is_idle: Callable[[], Awaitable[bool]], timeout_s: float) -> None:
        """Once told to end: wait until nothing is held any more, or the time is up, then stop."""
        await self._ending.wait()
        try:
            async with asyncio.timeout(timeout_s):
                while not await is_idle():
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            _log.error("not drained in time; what still runs is broken off", timeout_s=timeout_s)
            self.stop(DRAIN_DEADLINE_EXIT_CODE)
        else:
            _log.info("drained")
            self.stop(self.ending_code)


@contextlib.asynccontextmanager
async def background(*work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    """Run these beside the block; they are cancelled at its end. One that fails by itself fails the block."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(each) for each in work]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
