"""Steps of all ranks of a worker: the scheduler's runs go to each, and a step has ended when it has on all."""

from collections.abc import Sequence

from pdkv.daemons.other_ranks import OtherRanks
from pdkv.daemons.rank_link import StepEnded, StepRuns
from pdkv.errors import RankLostError
from pdkv.m3.config import M3Config
from pdkv.m3.run import Onward, Run, Step
from pdkv.m3.step import Landed, Runner, StepInFlight, StepOutput


class RankedRunner:
    """``Runner`` of rank 0: ``local`` computes its share. Used from the engine thread only."""

    def __init__(self, local: Runner, others: OtherRanks) -> None:
        self._local = local
        self._others = others

    @property
    def config(self) -> M3Config:
        return self._local.config

    @property
    def overlaps(self) -> bool:
        """Where there is no other rank that would have to keep up."""
        return self._others.size == 1 and self._local.overlaps

    def launch(self, step: Step) -> StepInFlight:
        if self._others.size == 1:
            return self._local.launch(step)
        assert not isinstance(step, Onward), "no step is in flight"
        return Landed(self.run(step))

    def run(self, runs: Sequence[Run]) -> StepOutput:
        """Compute one step on all ranks. Returns when every rank has said that its writes are done, so that whoever is
        told of progress may read from any of them. Raises ``RankLostError`` that names the rank at fault."""
        self._others.tell(StepRuns(tuple(runs)))
        try:
            output = self._local.launch(list(runs)).wait()
        except RankLostError as exc:  # of a collective, which does not know whom it waited for
            raise self._others.loss() or exc from exc
        self._others.gather(StepEnded)
        return output
