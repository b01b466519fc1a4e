"""Workers that answer late, over real connections: slow is not lost, and those that are prompt come first."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable

import msgspec

from pdkv.daemons.worker_api import WorkerInfo
from pdkv.daemons.worker_client import WorkerClient
from pdkv.daemons.worker_pool import Patience, WorkerPool

NEVER_S = 600.0
"""Longer than any test: what would happen then does not."""


class StarvingWorker:
    """Answers every look while ``answers`` is set, and lets all others wait until it is."""

    def __init__(self, role: str, incarnation: str) -> None:
        info = WorkerInfo(role=role, ready=True, model="m3", incarnation=incarnation, manifest_digest="same")
        body = msgspec.json.encode(info)
        self.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
        self.answers = asyncio.Event()
        self.answers.set()
        self.num_looks = 0
        self.url = ""

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                await reader.readuntil(b"\r\n\r\n")
                self.num_looks += 1
                await self.answers.wait()
                writer.write(self.answer)
                await writer.drain()


@contextlib.asynccontextmanager
async def deployment(patience: Patience, num_prefill: int) -> AsyncIterator[tuple[WorkerPool, list[StarvingWorker]]]:
    """A pool that has found all of its prefill workers and the one decode worker, which is the last of the list."""
    workers = [StarvingWorker("prefill", f"p{i}") for i in range(num_prefill)] + [StarvingWorker("decode", "d")]
    async with contextlib.AsyncExitStack() as stack:
        for worker in workers:
            server = await stack.enter_async_context(await asyncio.start_server(worker.talk, "127.0.0.1", 0))
            host, port = server.sockets[0].getsockname()
            worker.url = f"http://{host}:{port}"
        client = await stack.enter_async_context(WorkerClient(5.0, 5.0))
        urls = [worker.url for worker in workers]
        pool = WorkerPool(client, urls[:-1], urls[-1:], 0.001, patience=patience)
        async with pool.polling():
            await until(lambda: all(view.ready for view in pool.view()))
            yield pool, workers
            for worker in workers:
                worker.answers.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.001)


def test_a_worker_that_is_slow_to_answer_is_used_while_there_is_no_other() -> None:
    async def story() -> None:
        async with deployment(Patience(slow_s=0.01, lost_s=NEVER_S), num_prefill=1) as (pool, workers):
            starved = workers[0]
            starved.answers.clear()
            await until(lambda: pool.view()[0].problem.startswith("slow"))
            asked = starved.num_looks
            assert pool.view()[0].ready
            assert pool.missing() == []
            pair = pool.next_pair()
            assert pair is not None
            assert pair.prefill.url == starved.url
            assert starved.num_looks == asked, "whoever is starved is not asked again before it has answered"
            starved.answers.set()
            await until(lambda: pool.view()[0].problem == "")

    asyncio.run(story())


def test_a_worker_that_is_prompt_comes_before_one_that_is_slow() -> None:
    async def story() -> None:
        async with deployment(Patience(slow_s=0.01, lost_s=NEVER_S), num_prefill=2) as (pool, workers):
            workers[0].answers.clear()
            await until(lambda: pool.view()[0].problem.startswith("slow"))
            assert all(view.ready for view in pool.view())
            workers[-1].answers.clear()
            await until(lambda: pool.view()[-1].problem.startswith("slow"))
            chosen = [pool.next_pair() for _ in range(4)]
            assert [pair and pair.prefill.url for pair in chosen] == [workers[1].url] * 4, "decode is slow in any pair"
            workers[0].answers.set()
            await until(lambda: pool.view()[0].problem == "")
            chosen = [pool.next_pair() for _ in range(4)]
            assert {pair and pair.prefill.url for pair in chosen} == {workers[0].url, workers[1].url}

    asyncio.run(story())


def test_a_worker_that_stays_silent_is_lost_and_found_again() -> None:
    async def story() -> None:
        async with deployment(Patience(slow_s=0.01, lost_s=0.05), num_prefill=1) as (pool, workers):
            workers[0].answers.clear()
            await until(lambda: not pool.view()[0].ready)
            assert pool.next_pair() is None
            assert "no prefill worker is ready" in pool.missing()[0]
            workers[0].answers.set()
            await until(lambda: pool.next_pair() is not None)
            assert pool.view()[0].problem == ""

    asyncio.run(story())


def test_a_worker_that_failed_a_request_must_answer_promptly() -> None:
    """It is under suspicion, and a request waits for what is known of it."""

    async def story() -> None:
        async with deployment(Patience(slow_s=0.05, lost_s=NEVER_S), num_prefill=1) as (pool, workers):
            pair = pool.next_pair()
            assert pair is not None
            workers[0].answers.clear()
            await pool.doubt(pair.prefill, pair.decode, reason="its request broke off")
            assert [view.ready for view in pool.view()] == [False, True]
            workers[0].answers.set()
            await until(lambda: pool.view()[0].ready)

    asyncio.run(story())
