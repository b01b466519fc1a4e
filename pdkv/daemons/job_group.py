"""The jobs of one request, one a prompt: opened together, heard as one stream of events, ended together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Sequence

from pdkv.daemons.engine_link import EngineLink, JobEvent, JobEvents
from pdkv.daemons.link import DecodeJob, JobFailed, JobFinished, PrefillJob


class JobGroup:
    """Belongs to the event loop's thread. Events carry the number of their job."""

    def __init__(self, link: EngineLink, jobs: Sequence[PrefillJob | DecodeJob], events: Sequence[JobEvents]) -> None:
        self._link = link
        self._jobs = jobs
        self._queue: asyncio.Queue[tuple[int, JobEvent]] = asyncio.Queue()
        self._num_running = len(jobs)
        self._pumps = [asyncio.create_task(self._pump(index, mine)) for index, mine in enumerate(events)]

    async def next(self) -> tuple[int, JobEvent]:
        """The next event of any job; those of one job come in order."""
        assert self._num_running, "nothing comes after the last job's last message"
        if not self._queue.empty():
            await asyncio.sleep(0)  # get() would not wait, and a flood would keep the news that the client has gone out
        index, event = await self._queue.get()
        if isinstance(event, JobFinished | JobFailed):
            self._num_running -= 1
        return index, event

    async def rest(self) -> AsyncIterator[tuple[int, JobEvent]]:
        """All that is still to come."""
        while self._num_running:
            yield await self.next()

    def finish(self, index: int) -> None:
        """Enough of a decode job: it ends with JobFinished, as if its last token had come. Harmless for one that has
        ended."""
        self._link.finish(self._jobs[index].transfer)

    def close(self) -> None:
        for pump in self._pumps:
            pump.cancel()

    async def _pump(self, index: int, events: JobEvents) -> None:
        while not events.ended:
            self._queue.put_nowait((index, await events.next()))


@contextlib.contextmanager
def open_jobs(link: EngineLink, jobs: Sequence[PrefillJob | DecodeJob]) -> Iterator[JobGroup]:
    """Start all jobs. Leaving the block aborts those that have not ended, for whatever reason it is left."""
    with contextlib.ExitStack() as stack:
        group = JobGroup(link, jobs, [stack.enter_context(link.open(job)) for job in jobs])
        stack.callback(group.close)
        yield group
