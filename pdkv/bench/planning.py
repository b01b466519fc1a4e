"""What it costs decode to turn pages into spans, and how many spans there are once page pools have been in use."""

import random
import statistics
import time
from collections import deque

import msgspec
import numpy as np

from pdkv.bench.geometry import LAYOUTS, Workload, manifest_of
from pdkv.core.plan import TransferPlan
from pdkv.memory.pages import PagePool
from pdkv.transport.ranges import int64_copy

_REPEATS = 15


class PlanCost(msgspec.Struct, frozen=True):
    """One transfer of all the workload's pages, scattered on both sides."""

    layout: str
    raw_spans: int
    """Before anything is merged: pages x regions."""
    spans: int
    plan_ms: float
    """CPU time of the thread that plans: pages to merged arrays of spans. The least of several, as is the next."""
    copy_ms: float
    """Checking aside, what handing them to a transport costs: a copy of the arrays."""


class Churn(msgspec.Struct, frozen=True):
    """Arena rows after random requests have come and gone on both sides."""

    requests: int
    pages_per_transfer: float
    spans_per_transfer: float
    """Of the last tenth of the requests, means."""


class PlanReport(msgspec.Struct, frozen=True):
    schema: str
    workload: Workload
    costs: tuple[PlanCost, ...]
    churn: Churn


def measure(workload: Workload, requests: int) -> PlanReport:
    """Raises ``ConfigError`` or ``ModelError`` for a workload that there is not."""
    costs = tuple(_cost(workload, layout) for layout in LAYOUTS)
    return PlanReport("pdkv.bench.plan/1", workload, costs, churn(workload, requests))


def _cost(workload: Workload, layout: str) -> PlanCost:
    manifest = manifest_of(workload.row(), workload.num_pages, layout)
    plan = TransferPlan.between([manifest], manifest)
    theirs = np.random.default_rng(workload.seed).permutation(workload.num_pages).tolist()
    ours = [workload.num_pages - 1 - page for page in theirs]
    planned, copied = [], []
    for _ in range(_REPEATS):
        began = time.thread_time()
        batch = plan.reads(theirs, ours, (0,))[0]
        ended = time.thread_time()
        int64_copy(batch)
        planned.append(ended - began)
        copied.append(time.thread_time() - ended)
    return PlanCost(
        layout=layout,
        raw_spans=plan.num_regions * workload.num_pages,
        spans=batch.num_spans,
        plan_ms=round(1e3 * min(planned), 2),
        copy_ms=round(1e3 * min(copied), 2),
    )


def churn(workload: Workload, requests: int) -> Churn:
    """Requests of random length, up to the workload's, on a prefill and a decode worker with room for eight of the
    longest. Prefill frees when the transfer is over, decode some time later, and in another order."""
    draw = random.Random(workload.seed)
    num_pages = 8 * workload.num_pages
    source, local = PagePool(num_pages), PagePool(num_pages)
    manifest = manifest_of(workload.row(), num_pages, "arena")
    plan = TransferPlan.between([manifest], manifest)
    on_source: deque[tuple[int, ...]] = deque()
    on_local: list[tuple[int, ...]] = []
    spans, pages = [], []
    for number in range(requests):
        wanted = draw.randint(1, workload.num_pages)
        while not source.can_reserve(wanted) or len(on_source) >= 4:
            source.free(on_source.popleft())
        while not local.can_reserve(wanted):
            local.free(on_local.pop(draw.randrange(len(on_local))))
        on_source.append(source.reserve(wanted))
        on_local.append(local.reserve(wanted))
        if number >= requests - max(1, requests // 10):
            spans.append(plan.reads(on_source[-1], on_local[-1], (0,))[0].num_spans)
            pages.append(wanted)
    return Churn(requests, round(statistics.mean(pages), 1), round(statistics.mean(spans), 1))
