"""When a prefill worker's role begins to compute, and when it lets go. The engine is real, no agent is asked."""

from typing import TypeVar

import pytest

from pdkv.agent.events import (
    AbandonTransfer,
    ExpectTransfer,
    FinishPrefill,
    GrantPages,
    PagesFreed,
    PrefillWanted,
    TransferEnded,
)
from pdkv.daemons.link import JobFailed, JobFinished, PrefillJob, Sampling, ToFront
from pdkv.daemons.prefill_role import PrefillRole
from pdkv.daemons.roles import EngineParts
from pdkv.errors import FailureCode
from pdkv.m3.config import kv_layout
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from pdkv.metrics import Meter
from pdkv.schema import TransferId
from tests.gpu.models import cpu_model, small_config

LONGEST = 256
A, B, C = (TransferId(bytes([n]) * 16) for n in range(3))
Told = TypeVar("Told")


@pytest.fixture(scope="module")
def model() -> M3Model:
    return cpu_model(small_config("float32"))


class Worker:
    """A role and its engine, and what they told front and agent."""

    def __init__(self, model: M3Model, num_pages: int = 6) -> None:
        self.said: list[ToFront] = []
        self.posted: list[object] = []
        self.num_pages = num_pages
        limits = EngineSettings(max_model_len=LONGEST)
        arena = Arena.allocate(RowLayout.of(kv_layout(model.config)), num_pages)
        self.engine = Engine(StepRunner(model, arena), PagePool(num_pages), limits)
        parts = EngineParts(self.engine, self.posted.append, self.said.append, Meter())
        self.role = PrefillRole(parts, 128, LONGEST)

    def ask(self, transfer: TransferId, num_tokens: int = 3) -> None:
        self.role.on_front(PrefillJob(transfer, [5] * num_tokens, Sampling(), 10.0), 0.0)

    def run(self) -> None:
        while self.engine.has_work:
            self.role.on_engine(self.engine.step())

    def told(self, kind: type[Told]) -> list[Told]:
        return [one for one in (*self.posted, *self.said) if isinstance(one, kind)]

    @property
    def num_free(self) -> int:
        return self.engine.statistics().num_pages_free


def test_an_idle_engine_begins_before_its_transfer_is_wanted(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(A)
    assert [type(one) for one in worker.posted] == [ExpectTransfer, GrantPages]
    worker.run()
    assert [done.transfer for done in worker.told(FinishPrefill)] == [A]
    assert not worker.told(JobFinished)  # or nobody could give it up
    worker.role.on_agent(PrefillWanted(A))
    assert [done.transfer for done in worker.told(JobFinished)] == [A]
    worker.run()
    assert len(worker.told(GrantPages)) == 1
    assert not worker.told(AbandonTransfer)
    worker.role.on_agent(PagesFreed(A))
    assert worker.num_free == worker.num_pages


def test_only_one_begins_early_until_it_is_wanted(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(A)
    worker.run()
    worker.ask(B)
    assert [granted.transfer for granted in worker.told(GrantPages)] == [A]
    worker.role.on_agent(PrefillWanted(A))
    worker.ask(C)
    assert [granted.transfer for granted in worker.told(GrantPages)] == [A, C]
    worker.role.on_agent(PrefillWanted(B))
    worker.run()
    assert [granted.transfer for granted in worker.told(GrantPages)] == [A, C, B]


def test_nothing_begins_early_beside_other_work(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(A)
    worker.role.on_agent(PrefillWanted(A))
    worker.ask(B)
    assert [granted.transfer for granted in worker.told(GrantPages)] == [A]


def test_nothing_begins_early_where_the_longest_prompt_would_not_fit_beside_it(model: M3Model) -> None:
    worker = Worker(model, num_pages=3)
    worker.ask(A, 129)
    assert not worker.told(GrantPages)
    worker.role.on_agent(PrefillWanted(A))
    worker.run()
    assert len(worker.told(FinishPrefill)) == 1


@pytest.mark.parametrize("computed", [False, True])
def test_what_began_early_is_let_go_when_its_transfer_ends(model: M3Model, *, computed: bool) -> None:
    worker = Worker(model)
    worker.ask(A)
    if computed:
        worker.run()
    worker.role.on_agent(PagesFreed(A))
    worker.role.on_agent(TransferEnded(A, FailureCode.CANCELLED, "the router gave up"))
    worker.run()
    assert worker.num_free == worker.num_pages
    assert len(worker.told(JobFailed)) == 1
    worker.ask(B)
    assert worker.told(GrantPages)[-1].transfer == B


@pytest.mark.parametrize("computed", [False, True])
def test_what_nobody_acquired_in_time_is_computed_when_somebody_does(model: M3Model, *, computed: bool) -> None:
    worker = Worker(model)
    worker.ask(A)
    if computed:
        worker.run()
    worker.role.on_agent(PagesFreed(A))
    assert worker.num_free == worker.num_pages
    worker.role.on_agent(PrefillWanted(A))
    worker.run()
    assert [granted.transfer for granted in worker.told(GrantPages)] == [A, A]
    assert len(worker.told(FinishPrefill)) == 1 + computed
    assert [done.transfer for done in worker.told(JobFinished)] == [A]


def test_a_transfer_that_had_ended_before_its_job_came_leaves_nothing(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(A)
    worker.role.on_agent(TransferEnded(A, FailureCode.CANCELLED, "decode was faster"))
    assert worker.num_free == worker.num_pages
    assert [failed.code for failed in worker.told(JobFailed)] == ["cancelled"]


def test_a_job_that_the_engine_refuses_fails_although_nobody_wanted_it_yet(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(A, LONGEST + 1)
    assert not worker.told(GrantPages)
    worker.role.on_agent(PrefillWanted(A))
    assert [failed.status for failed in worker.told(JobFailed)] == [400]
    assert [given_up.transfer for given_up in worker.told(AbandonTransfer)][:1] == [A]
