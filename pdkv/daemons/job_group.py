"""The jobs of one request: started together, heard as one stream of events, ended together."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from functools import partial

from pdkv.daemons.engine_link import EngineLink, JobEvent
from pdkv.daemons.link import DecodeJob, JobFailed, JobFinished, PrefillJob
from pdkv.daemons.traffic import note_failure


class JobGroup:
    """Belongs to the event loop's thread. Events carry the number of their job."""

    def __init__(self, jobs: Sequence[PrefillJob | DecodeJob], finish: Callable[[bytes], None]) -> None:
        """``finish``: tells the engine that a decode job is enough as it is."""
        self._jobs = jobs
        self._finish = finish
        self._queue: asyncio.Queue[tuple[int, JobEvent]] = asyncio.Queue()
        self._num_running = len(jobs)

    def hear(self, index: int, event: JobEvent) -> None:
        """A message of a job; nothing comes after its last."""
        self._queue.put_nowait((index, event))

    async def next(self) -> tuple[int, JobEvent]:
        """The next event of any job; those of one job come in order."""
        assert self._num_running, "nothing comes after the last job's last message"
        if not self._queue.empty():
            await asyncio.sleep(0)  # get() would not wait, and a flood would keep the news that the client has gone out
        index, event = await self._queue.get()
        if isinstance(event, JobFinished | JobFailed):
            self._num_running -= 1
        if isinstance(event, JobFailed):
            note_failure(event.code)
        return index, event

    async def rest(self) -> AsyncIterator[tuple[int, JobEvent]]:
        """All that is still to come."""
        while self._num_running:
            yield await self.next()

    def finish(self, index: int) -> None:
        """Enough of a decode job: it ends with JobFinished, as if its last token had come. Harmless for one that has
        ended."""
        self._finish(self._jobs[index].transfer)


@contextlib.contextmanager
def open_jobs(link: EngineLink, jobs: Sequence[PrefillJob | DecodeJob]) -> Iterator[JobGroup]:
    """Start all jobs. Leaving the block aborts those that have not ended, for whatever reason it is left."""
    group = JobGroup(jobs, link.finish)
    with contextlib.ExitStack() as stack:
        for index, job in enumerate(jobs):
            stack.enter_context(link.open(job, partial(group.hear, index)))
        yield group
