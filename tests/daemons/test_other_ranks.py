"""Rank 0's view of the other ranks, over real socket pairs whose far ends the tests hold."""

import queue
import socket
import threading
from collections.abc import Iterator

import msgspec
import pytest

from pdkv.agent.rank_reads import LinkConnected, RankReport
from pdkv.daemons import other_ranks
from pdkv.daemons.link import BlockingLink
from pdkv.daemons.other_ranks import OtherRanks, RankEnd
from pdkv.daemons.rank_link import RankBeat, RankBeatQuery, RankFatal, StepEnded, StepRuns, ToRank
from pdkv.daemons.ranked_runner import RankedRunner
from pdkv.errors import RankLostError
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run
from pdkv.m3.step import Landed, StepOutput

PATIENCE_S = 60.0
RUNS = [Run(id=RequestId(b"one"), tokens=(1, 2), start=0, pages=(3,), sampling=None)]


class FarEnd:
    """What a rank does is done by the test."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self.link = BlockingLink(ours)
        self.far = BlockingLink(theirs)
        self.end = RankEnd("exited with 1", by_force=False)
        self._decoder = msgspec.msgpack.Decoder(ToRank)

    def ended(self) -> RankEnd:
        return self.end

    def hears(self) -> object:
        """The next message that is no beat."""
        while True:
            body = self.far.receive_bytes()
            assert body is not None, "rank 0 has ended the link"
            message = self._decoder.decode(body)
            if not isinstance(message, RankBeatQuery):
                return message

    def dies(self, told: str = "was killed by SIGKILL", *, by_force: bool = True) -> None:
        self.end = RankEnd(told, by_force)
        self.far.end()


class Watched:
    """Three ranks of which two are far ends, and what was heard of them."""

    def __init__(self) -> None:
        self.members = [FarEnd(), FarEnd()]
        self.reports: queue.SimpleQueue[tuple[int, RankReport]] = queue.SimpleQueue()
        self.lost: queue.SimpleQueue[RankLostError] = queue.SimpleQueue()
        self.forced: queue.SimpleQueue[RankLostError] = queue.SimpleQueue()
        self.others = OtherRanks(self.members, at_worst=self.forced.put)
        self.others.listen(lambda rank, report: self.reports.put((rank, report)), self.lost.put)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Iterator[Watched]:
    monkeypatch.setattr(other_ranks, "_BEAT_EVERY_S", 0.01)
    made = Watched()
    yield made
    made.others.close()
    for member in made.members:
        member.far.release()


class Computes:
    """A runner whose step ends at once, or fails as a collective does that lost a rank."""

    config = None

    def __init__(self, error: RankLostError | None = None) -> None:
        self._error = error

    def launch(self, _runs: object) -> Landed:
        if self._error is not None:
            raise self._error
        return Landed(StepOutput([], {}))


def test_a_step_has_ended_when_it_has_on_every_rank(watched: Watched) -> None:
    ended: queue.SimpleQueue[StepOutput] = queue.SimpleQueue()
    runner = RankedRunner(Computes(), watched.others)  # type: ignore[arg-type]
    thread = threading.Thread(target=lambda: ended.put(runner.run(RUNS)))
    thread.start()
    for member in watched.members:
        assert member.hears() == StepRuns(tuple(RUNS))
        assert ended.empty(), "not all ranks have written"
        member.far.send(StepEnded())
    assert ended.get(timeout=PATIENCE_S) == StepOutput([], {})
    thread.join()


def test_reports_come_with_their_rank(watched: Watched) -> None:
    for number, member in enumerate(watched.members):
        member.far.send(LinkConnected(number, 1, {}))
        assert watched.reports.get(timeout=PATIENCE_S) == (number + 1, LinkConnected(number, 1, {}))


def test_orders_go_to_their_rank(watched: Watched) -> None:
    first, second = watched.others.carriers()
    second(StepRuns(()))  # type: ignore[arg-type]
    assert watched.members[1].hears() == StepRuns(())


def test_a_rank_that_is_killed_is_named_with_the_signal(watched: Watched) -> None:
    watched.members[1].dies()
    error = watched.lost.get(timeout=PATIENCE_S)
    assert str(error) == "rank 2 of this worker's 3 was killed by SIGKILL"
    with pytest.raises(RankLostError, match="rank 2 of this worker's 3 was killed"):
        watched.others.gather(StepEnded)


def test_the_killed_rank_is_named_though_others_complain_first(watched: Watched) -> None:
    """Its neighbours' collectives fail because of it, and rank 0 may hear of them sooner."""
    complaining, killed = watched.members
    complaining.far.send(RankFatal("lost another rank in a sum: connection closed", 1))
    complaining.dies("exited with 1")
    killed.dies()
    assert str(watched.lost.get(timeout=PATIENCE_S)) == "rank 2 of this worker's 3 was killed by SIGKILL"
    assert watched.lost.empty()


def test_a_rank_that_fails_by_itself_says_why_and_with_which_code(watched: Watched) -> None:
    watched.members[0].far.send(RankFatal("this model cannot be divided", 2))
    watched.members[0].dies("exited with 2")
    error = watched.lost.get(timeout=PATIENCE_S)
    assert str(error) == "rank 1 of this worker's 3 failed: this model cannot be divided"
    assert error.exit_code == 2


def test_a_collective_that_fails_is_explained_by_the_rank_that_was_lost(watched: Watched) -> None:
    watched.members[0].dies()
    runner = RankedRunner(Computes(RankLostError("somebody does not answer")), watched.others)  # type: ignore[arg-type]
    with pytest.raises(RankLostError, match="rank 1 of this worker's 3 was killed by SIGKILL"):
        runner.run(RUNS)


def test_a_collective_that_fails_for_no_known_reason_keeps_its_own(
    watched: Watched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(other_ranks, "_BLAME_S", 0.05)
    runner = RankedRunner(Computes(RankLostError("somebody does not answer")), watched.others)  # type: ignore[arg-type]
    with pytest.raises(RankLostError, match="somebody does not answer"):
        runner.run(RUNS)


def test_a_loss_that_nobody_acts_on_ends_by_force(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_ranks, "_GRACE_S", 0.05)
    watched.members[0].dies()
    assert "rank 1" in str(watched.forced.get(timeout=PATIENCE_S))


def test_ranks_that_end_because_they_are_let_go_are_no_loss(watched: Watched) -> None:
    watched.others.close()
    for member in watched.members:
        while member.far.receive_bytes() is not None:  # beats may still lie there
            pass
    assert watched.lost.empty()
    assert watched.forced.empty()


def test_a_rank_that_answers_no_beats_grows_old(watched: Watched) -> None:
    answering, silent = watched.members
    while watched.others.beat_age_s() < 0.2:
        assert isinstance(msgspec.msgpack.decode(answering.far.receive_bytes() or b"", type=ToRank), RankBeatQuery)
        answering.far.send(RankBeat())
    silent.far.send(RankBeat())
    while watched.others.beat_age_s() >= 0.2:
        answering.far.receive_bytes()
        answering.far.send(RankBeat())


def test_a_worker_of_one_rank_waits_for_nobody() -> None:
    others = OtherRanks()
    others.listen(lambda *_: None, lambda _: None)
    assert RankedRunner(Computes(), others).run(RUNS) == StepOutput([], {})  # type: ignore[arg-type]
    assert others.beat_age_s() == 0.0
    others.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_rank_that_talks_nonsense_is_lost(watched: Watched) -> None:
    watched.members[0].end = RankEnd("exited with 0", by_force=False)
    watched.members[0].far.send_frame(b"\x01\x00\x00\x00\xc1")
    assert str(watched.lost.get(timeout=PATIENCE_S)) == "rank 1 of this worker's 3 exited with 0"
