"""What a decode worker's role tells its front, and when it gives a job up. The engine is real, no agent is asked."""

import time

import msgspec
import pytest

from pdkv.agent.events import PagesReturned, StartTransfer, TransferArrived, TransferFacts
from pdkv.agent.loop import now
from pdkv.daemons.decode_role import DecodeRole
from pdkv.daemons.link import (
    AbortJob,
    DecodeJob,
    GroupTokens,
    JobFailed,
    JobFinished,
    Sampling,
    StepTokens,
    ToFront,
    TokenReader,
    TokensOut,
)
from pdkv.daemons.roles import EngineParts
from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeShapes
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

NUM_PAGES = 8
FACTS = TransferFacts(1, 1, 1, 0, {}, 0, 0.0, 0.0, "", "")


@pytest.fixture(scope="module")
def model() -> M3Model:
    return cpu_model(small_config("float32"))


class Worker:
    """A role and its engine; a transfer has moved nothing when it has arrived, so all prompts are of zeros."""

    def __init__(self, model: M3Model) -> None:
        self.said: list[ToFront] = []
        self.asked: list[object] = []
        limits = EngineSettings(max_model_len=400, max_batch=4)
        arena = Arena.allocate(RowLayout.of(kv_layout(model.config)), NUM_PAGES)
        arena.rows().zero_()
        shapes = DecodeShapes.of(limits, 128, NUM_PAGES)
        self.engine = Engine(StepRunner(model, arena, shapes, always_shaped=True), PagePool(NUM_PAGES), limits)
        self.role = DecodeRole(EngineParts(self.engine, self.asked.append, self.said.append, Meter()), 128)

    def ask(self, name: bytes, at: float = 0.0, **changes: object) -> None:
        job = DecodeJob(name, [5, 6, 7], 5, Sampling(), True, "tcp://p", 1, 10.0)
        self.role.on_front(msgspec.structs.replace(job, **changes), at)

    def arrive(self, name: bytes) -> None:
        self.role.on_agent(TransferArrived(TransferId(name), 9, -0.5, FACTS))

    def step(self) -> list[ToFront]:
        """What it leads to being said."""
        self.said.clear()
        self.role.on_engine(self.engine.step())
        return list(self.said)


def test_the_report_says_when_the_state_was_there_by_the_calendar(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(b"a", max_tokens=1)
    facts = msgspec.structs.replace(FACTS, resident_at=now() - 100.0)
    worker.role.on_agent(TransferArrived(TransferId(b"a"), 9, -0.5, facts))
    (report,) = (said.report for said in worker.said if isinstance(said, JobFinished))
    assert report is not None
    assert 100.0 <= time.time() - report.resident_at < 160.0


def test_a_step_is_told_in_one_message(model: M3Model) -> None:
    worker = Worker(model)
    for name in (b"a", b"b", b"c"):
        worker.ask(name)
        worker.arrive(name)
    assert [type(said) for said in worker.said] == [StepTokens] * 3, "first tokens, as they arrive"
    reader = TokenReader()
    (told,) = worker.step()
    assert isinstance(told, GroupTokens)
    assert told.transfers == [b"a", b"b", b"c"]
    first = list(reader.each(told))
    assert [(type(out), out.transfer, len(out.tokens)) for out in first] == [
        (TokensOut, name, 1) for name in (b"a", b"b", b"c")
    ]
    (told,) = worker.step()
    assert isinstance(told, GroupTokens)
    assert told.transfers is None, "who has which place is said when it changes"
    assert [out.transfer for out in reader.each(told)] == [b"a", b"b", b"c"]


def test_whoever_leaves_or_joins_is_told_by_place(model: M3Model) -> None:
    """Each job's tokens as one that nobody joins or leaves is told them, and none behind its end."""
    alone = {}
    for name, max_tokens in ((b"a", 9), (b"b", 3), (b"c", 9), (b"d", 6)):
        worker = Worker(model)
        alone[name] = told_by(worker, {0: [(name, max_tokens)]})[name]
        assert len(alone[name]) == max_tokens
    worker = Worker(model)
    together = told_by(worker, {0: [(b"a", 9), (b"b", 3), (b"c", 9)], 3: [(b"d", 6)], 4: [b"a"]})
    assert 3 < len(together[b"a"]) < 9, "given up"
    assert together == alone | {b"a": alone[b"a"][: len(together[b"a"])]}


def told_by(worker: Worker, script: dict[int, list[tuple[bytes, int] | bytes]]) -> dict[bytes, list[int]]:
    """``script``: by number of steps before, jobs that come, and names of those that are given up."""
    reader, told, ended, number = TokenReader(), dict[bytes, list[int]](), set[bytes](), 0
    while worker.engine.has_work or not number:
        said = worker.said
        for what in script.get(number, []):
            if isinstance(what, bytes):
                worker.role.on_front(AbortJob(what), 0.0)
            else:
                worker.ask(what[0], max_tokens=what[1])
                worker.arrive(what[0])
        said = [*worker.said, *worker.step()]
        for message in said:
            if isinstance(message, JobFinished | JobFailed):
                ended.add(message.transfer)
            each = reader.each(message) if isinstance(message, StepTokens | GroupTokens) else []
            for one in each:
                assert one.transfer not in ended
                told.setdefault(one.transfer, []).extend(one.tokens)
        worker.said.clear()
        number += 1
    assert ended == told.keys()
    return told


def test_whoever_ends_or_asks_for_more_is_told_besides(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(b"a")
    worker.ask(b"b", max_tokens=2)
    worker.ask(b"c", num_top=2, sampling=Sampling(0.7, 3))
    for name in (b"a", b"b", b"c"):
        worker.arrive(name)
    told, finished = worker.step()
    assert isinstance(told, GroupTokens)
    assert isinstance(finished, JobFinished)
    each = list(TokenReader().each(told))
    assert [(one.transfer, len(one.tokens)) for one in each] == [(name, 1) for name in (b"a", b"b", b"c")]
    assert [[len(top.token_ids) for top in one.top] for one in each] == [[], [], [2]]
    (top,) = each[2].top
    assert top.logprobs[0] >= top.logprobs[1]
    assert (finished.transfer, finished.reason) == (b"b", "length")
    while worker.engine.has_work:
        worker.step()
    assert worker.engine.statistics().num_pages_free == NUM_PAGES


def test_tokens_of_one_job_come_as_one_event() -> None:
    told = StepTokens((b"a", b"a", b"b"), [1, 2, 3], [-0.1, -0.2, -0.3])
    assert list(told.each()) == [TokensOut(b"a", [1, 2], [-0.1, -0.2]), TokensOut(b"b", [3], [-0.3])]


def test_every_job_has_its_own_deadline(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(b"late", deadline_s=20.0)
    worker.ask(b"early", deadline_s=5.0)
    worker.arrive(b"early")
    worker.said.clear()
    worker.role.on_time(4.9)
    assert not worker.said
    worker.role.on_time(5.0)
    assert [(said.transfer, said.code) for said in worker.said if isinstance(said, JobFailed)] == [
        (b"early", "deadline")
    ]
    worker.role.on_time(19.9)
    assert len(worker.said) == 1
    worker.role.on_time(20.0)
    assert len(worker.said) == 2
    worker.role.on_time(21.0)
    assert len(worker.said) == 2


def test_the_deadline_of_a_job_that_is_over_is_nobody_elses(model: M3Model) -> None:
    worker = Worker(model)
    worker.ask(b"a", deadline_s=5.0)
    worker.role.on_front(AbortJob(b"a"), 1.0)
    worker.role.on_agent(PagesReturned(TransferId(b"a")))
    worker.ask(b"a", at=2.0, deadline_s=10.0)
    assert isinstance(worker.asked[-1], StartTransfer)
    worker.said.clear()
    worker.role.on_time(6.0)
    assert not worker.said
    worker.role.on_time(12.0)
    assert [said.code for said in worker.said if isinstance(said, JobFailed)] == ["deadline"]
