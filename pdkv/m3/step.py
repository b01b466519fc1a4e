"""One step of the model for the runs that the scheduler chose: lay them out, compute, choose tokens, score prompts."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import msgspec
import torch

from pdkv.m3.choosing import Choice, Chooser
from pdkv.m3.config import M3Config
from pdkv.m3.decode_graphs import MAX_QUERY_LEN, DecodeGraphs, DecodeInFlight, DecodeShapes
from pdkv.m3.layer_progress import LayerProgress
from pdkv.m3.model import KvViews, M3Model, StepBatch
from pdkv.m3.requests import PromptScored, RequestId, RequestRefused
from pdkv.m3.run import NOT_FINITE, Onward, Run, Step
from pdkv.m3.sampling import Choices, Sample, sample
from pdkv.m3.scoring import score

_ROWS_AT_ONCE = 64
"""With a vocabulary of 200,000 these are 51 MB of float32, and twice as much while they are looked at."""


class StepOutput(NamedTuple):
    """Of rank 0; other ranks make the same collective calls and come out with nothing."""

    samples: list[Sample | None] | Choices
    """What was chosen, ``num_choices`` entries a run; ``None`` where the logits are not finite."""
    scored: dict[RequestId, PromptScored | RequestRefused]
    """What was scored, by request."""


_NOTHING_SCORED: dict[RequestId, PromptScored | RequestRefused] = {}


class StepInFlight(Protocol):
    """A step that was launched."""

    def wait(self) -> StepOutput:
        """When it returns, all ranks' kernels that write into the cache have ended. Called once, in order of launch."""
        ...


class Landed(NamedTuple):
    """A step that has ended already."""

    output: StepOutput

    def wait(self) -> StepOutput:
        return self.output


class Runner(Protocol):
    """Whatever carries out a step, in this process or in several. Used from the engine thread only."""

    @property
    def config(self) -> M3Config: ...

    @property
    def overlaps(self) -> bool:
        """A step that only decodes is launched without a wait, and one other behind it before anybody waits for it."""
        ...

    def launch(self, step: Step) -> StepInFlight:
        """Begin one step, or compute it."""
        ...


class StepRunner:
    """Steps of one rank's model over its cache, on the model's device. Collective: every rank runs the same steps."""

    def __init__(
        self,
        model: M3Model,
        cache: KvViews,
        decode: DecodeShapes | None = None,
        progress: LayerProgress | None = None,
        *,
        always_shaped: bool = False,
    ) -> None:
        """``decode``: shapes in which steps that only decode run, on a device that replays them as CUDA graphs;
        ``always_shaped``: on any other too, launched one by one and in the same order.
        ``progress``: told of layers as they are stored, on rank 0 of a worker that others read from."""
        self._model = model
        self._cache = cache
        self._progress = progress
        self._graphs: DecodeGraphs | None = None
        if decode is not None and (model.can_capture or always_shaped):
            self._graphs = DecodeGraphs(model, cache, decode, replays=model.can_capture)

    def prepare(self) -> None:
        """Do now what the first steps would take time for."""
        if self._graphs is not None:
            self._graphs.prepare()

    @property
    def config(self) -> M3Config:
        return self._model.config

    @property
    def overlaps(self) -> bool:
        return self._graphs is not None

    def launch(self, step: Step) -> StepInFlight:
        if isinstance(step, Onward):
            assert self._graphs is not None, "only decode steps go on"
            return _Decoding(self._graphs.launch(step))
        if self._graphs is not None and self._graphs.takes(step):
            flight = self._graphs.launch(step)
            return _Decoding(flight) if flight.is_drawn else _Verifying(self, step, flight)
        return Landed(self._compute(step))

    def run(self, runs: Sequence[Run]) -> StepOutput:
        """Compute one step."""
        return self.launch(list(runs)).wait()

    @torch.inference_mode()
    def _compute(self, runs: Sequence[Run]) -> StepOutput:
        device = self._model.device
        on_stored = self._progress.of(runs) if self._progress is not None else None
        batch = step_batch(runs, self.config.block_size, device)
        hidden = self._model.hidden(batch, self._cache, on_stored)  # [num_rows, hidden]
        rows = torch.split(hidden, [len(run.wanted_rows) for run in runs])
        choices = [choice for run in runs for choice in _choices(run)]
        behind = [mine[len(mine) - run.num_choices :] for run, mine in zip(runs, rows, strict=True)]
        samples = self.choose(torch.cat(behind), choices)
        scored: dict[RequestId, PromptScored | RequestRefused] = {}
        for run, mine in zip(runs, rows, strict=True):
            if run.targets:
                found = score(self._model, mine[: len(run.targets)], run.targets, run.prompt_top)
                if self._model.group.rank > 0:
                    continue
                refused = RequestRefused(run.id, NOT_FINITE, never=False)
                scored[run.id] = PromptScored(run.id, found) if found is not None else refused
        if device.type != "cpu":
            # Whoever is told of progress may read the pages: the kernels that wrote them must have ended.
            torch.accelerator.current_stream(device).synchronize()
        return StepOutput(samples, scored)

    @torch.inference_mode()
    def choose(self, hidden: torch.Tensor, choices: Sequence[Choice]) -> list[Sample | None]:
        """hidden: [num_choices, hidden], as lm_head takes it; a limited number of rows becomes logits at a time."""
        samples: list[Sample | None] = []  # stay empty on every rank but the first
        chooser = None
        if hidden.device.type != "cpu" and choices and self._model.group.rank == 0:
            chooser = Chooser(choices, hidden.device)
        for begin in range(0, len(choices), _ROWS_AT_ONCE):
            few = slice(begin, begin + _ROWS_AT_ONCE)
            if chooser is not None and self._model.group.size == 1:
                chooser.choose(self._model.plain_logits(hidden[few]))  # as decode steps do
                continue
            logits = self._model.logits(hidden[few])
            if logits is None:
                continue
            if chooser is not None:
                chooser.choose(logits)
            else:
                samples += _choose(logits, choices[few])
        return samples if chooser is None else chooser.wait().samples()


class _Decoding(msgspec.Struct, frozen=True):
    """All that is asked for is chosen with the step."""

    flight: DecodeInFlight

    def wait(self) -> StepOutput:
        return StepOutput(self.flight.wait(), _NOTHING_SCORED)


class _Verifying(NamedTuple):
    """Greedy choices come with the step; where something else is asked for, the row's logits are computed again.

    Nothing may be launched behind a step of that kind before it has been waited for."""

    runner: StepRunner
    runs: Sequence[Run]
    """That may want something else."""
    flight: DecodeInFlight

    def wait(self) -> StepOutput:
        greedy = self.flight.wait()
        if not any(run.num_top or (run.sampling is not None and run.sampling.temperature) for run in self.runs):
            return StepOutput(greedy, {})
        samples = greedy.samples()
        choices = [choice for run in self.runs for choice in _choices(run)]
        others = [row for row, choice in enumerate(choices) if choice.num_top or choice.sampling.temperature]
        found = self.runner.choose(self.flight.hidden(others), [choices[row] for row in others])
        for row, sample_or_none in zip(others, found, strict=True):
            samples[row] = sample_or_none
        return StepOutput(samples, {})


def step_batch(runs: Sequence[Run], block_size: int, device: torch.device) -> StepBatch:
    """Lay the runs of one step end to end."""
    starts = [0]
    for run in runs:
        starts.append(starts[-1] + len(run.tokens))
    pages = [run.pages[: -(-run.end // block_size)] for run in runs]
    width = max(map(len, pages))
    lengths = {len(run.tokens) for run in runs}
    return StepBatch(
        token_ids=torch.tensor([token for run in runs for token in run.tokens], dtype=torch.int64, device=device),
        positions=torch.cat([torch.arange(run.start, run.end, dtype=torch.int64) for run in runs]).to(device),
        query_starts=torch.tensor(starts, dtype=torch.int32, device=device),
        context_lens=torch.tensor([run.start for run in runs], dtype=torch.int32, device=device),
        page_table=torch.tensor(
            [mine + (-1,) * (width - len(mine)) for mine in pages], dtype=torch.int32, device=device
        ),
        logits_rows=torch.tensor(
            [start + row for run, start in zip(runs, starts, strict=False) for row in run.wanted_rows],
            dtype=torch.int64,
            device=device,
        ),
        query_len=next(iter(lengths)) if len(lengths) == 1 and max(lengths) <= MAX_QUERY_LEN else 0,
    )


def _choices(run: Run) -> list[Choice]:
    """In the order of the run's rows."""
    if run.sampling is None:
        return []
    return [Choice(run.sampling, run.end - i, run.num_top) for i in reversed(range(run.num_choices))]


def _choose(logits: torch.Tensor, choices: Sequence[Choice]) -> list[Sample | None]:
    """The token after each row of ``logits``, float32 [num_choices, vocab]; ``None`` where the logits are not finite,
    so that one damaged request harms only itself."""
    is_finite: list[bool] = logits.isfinite().all(dim=1).tolist()
    sound = [row for row, finite in enumerate(is_finite) if finite]
    params, positions = [choices[row].sampling for row in sound], [choices[row].position for row in sound]
    chosen = iter(sample(logits[sound], params, positions, [choices[row].num_top for row in sound]))
    return [next(chosen) if finite else None for finite in is_finite]
