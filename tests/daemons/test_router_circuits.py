"""What the router exports of its workers' circuits, over real connections."""

import asyncio

import msgspec

from pdkv.daemons.router_metrics import RouterMetrics
from pdkv.daemons.worker_api import WorkerInfo
from pdkv.daemons.worker_pool import Patience, WorkerPool
from pdkv.metric_table import CIRCUITS, CIRCUITS_OPENED, WORKER_RESTARTS, WORKERS_READY
from pdkv.metrics import Meter, Metric
from tests.daemons.test_worker_pool import NEVER_S, StarvingWorker, deployment, until


async def exported(pool: WorkerPool, metric: Metric, *labels: str) -> float:
    series = await RouterMetrics(pool, Meter()).collect()
    (value,) = [each.value for each in series if (each.name, each.labels) == (metric.name, labels)]
    return value


async def circuits(pool: WorkerPool) -> tuple[float, float, float]:
    """Prefill workers whose circuit is closed, slow, open."""
    closed, slow, opened = [await exported(pool, CIRCUITS, "prefill", state) for state in ("closed", "slow", "open")]
    assert await exported(pool, WORKERS_READY, "prefill") == closed + slow
    return closed, slow, opened


def answer_as(worker: StarvingWorker, incarnation: str) -> None:
    body = msgspec.json.encode(WorkerInfo(role="prefill", ready=True, model="m3", incarnation=incarnation))
    worker.answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)


def test_a_circuit_opens_and_closes_with_its_worker() -> None:
    async def story() -> None:
        async with deployment(Patience(slow_s=0.01, lost_s=NEVER_S), num_prefill=2) as (pool, workers):
            assert await circuits(pool) == (2, 0, 0)
            workers[0].answers.clear()
            await until(lambda: pool.view()[0].problem.startswith("slow"))
            assert await circuits(pool) == (1, 1, 0)
            assert await exported(pool, CIRCUITS_OPENED, "prefill") == 0, "slow is not out"
            first = next(pool.workers())
            await pool.doubt(first, reason="failed a request")
            assert await circuits(pool) == (1, 0, 1) or await circuits(pool) == (1, 1, 0)
            await pool.doubt(first, reason="failed another")
            assert first.info is None
            assert await exported(pool, CIRCUITS_OPENED, "prefill") == 1, "it was out already"
            assert await exported(pool, WORKER_RESTARTS, "prefill") == 0
            answer_as(workers[0], "p0 again")
            workers[0].answers.set()
            await until(lambda: pool.view()[0].incarnation == "p0 again")
            assert await circuits(pool) == (2, 0, 0)
            assert await exported(pool, WORKER_RESTARTS, "prefill") == 1, "whatever lay between"
            assert await exported(pool, WORKER_RESTARTS, "decode") == 0

    asyncio.run(story())
