"""Layers that are told of before their step ends: what is told is written, and nothing is told of other steps."""

import queue
import threading
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from pdkv.m3 import model
from pdkv.m3.config import kv_layout
from pdkv.m3.layer_progress import LayerProgress, TellGroups, group_starts
from pdkv.m3.model import load_model
from pdkv.m3.parallel import Group, run_ranks
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from tests.checkpoints import write_random_checkpoint

CPU = torch.device("cpu")
ONE, TWO = RequestId(b"1"), RequestId(b"2")


def run_of(request: RequestId, length: int, *, is_last: bool) -> Run:
    return Run(
        id=request, tokens=(0,) * length, start=100, pages=(1, 2), sampling=SamplingParams() if is_last else None
    )


@pytest.mark.parametrize(
    ("num_layers", "num_groups", "starts"),
    [(60, 4, (0, 24, 42, 54)), (60, 1, (0,)), (4, 4, (0, 1, 2, 3)), (3, 64, (0, 1, 2)), (1, 4, (0,)), (5, 2, (0, 3))],
)
def test_later_groups_are_smaller(num_layers: int, num_groups: int, starts: tuple[int, ...]) -> None:
    assert group_starts(num_layers, num_groups) == starts


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 8, 64])
def test_every_group_has_a_layer_and_every_layer_a_group(num_groups: int) -> None:
    for num_layers in range(1, 70):
        starts = group_starts(num_layers, num_groups)
        assert starts[0] == 0
        assert len(starts) == min(num_layers, num_groups)
        assert all(a < b for a, b in pairwise(starts + (num_layers,)))


def test_prompts_that_end_in_a_step_are_told_of_as_their_groups_are_stored() -> None:
    told: list[tuple[RequestId, int, int]] = []
    progress = LayerProgress((0, 3, 5), 6, CPU, lambda *what: told.append(what))
    runs = [run_of(ONE, 300, is_last=True), run_of(TWO, 300, is_last=False)]
    stored = progress.of(runs)
    assert stored is not None
    counts = []
    for layer in range(6):
        stored(layer + 1)
        counts.append(len(told))
    assert counts == [0, 0, 1, 1, 2, 3]
    assert told == [(ONE, 400, 1), (ONE, 400, 2), (ONE, 400, 3)]


def test_of_a_few_tokens_all_layers_are_told_at_once() -> None:
    told: list[tuple[RequestId, int, int]] = []
    stored = LayerProgress((0, 3, 5), 6, CPU, lambda *what: told.append(what)).of([run_of(ONE, 40, is_last=True)])
    assert stored is not None
    for layer in range(6):
        stored(layer + 1)
    assert told == [(ONE, 140, 3)]


def test_a_step_that_ends_no_prompt_tells_nothing() -> None:
    progress = LayerProgress((0, 3), 6, CPU, lambda *_: pytest.fail("nobody waits for this"))
    assert progress.of([run_of(TWO, 5, is_last=False)]) is None


class Rank:
    """One rank's pages while a step of a whole prompt runs, seen from whoever is told of layers."""

    def __init__(self, directory: Path, group: Group) -> None:
        self.model = load_model(directory, group=group)
        layout = RowLayout.of(kv_layout(self.model.config), group.rank, group.size)
        self.arena = Arena.allocate(layout, 3)
        self.arena.rows().fill_(0xA5)

    def compute(self, tell: TellGroups) -> None:
        layers = self.model.config.num_layers
        starts = group_starts(layers, layers)
        progress = LayerProgress(starts, layers, CPU, tell) if self.model.group.rank == 0 else None
        run = Run(id=ONE, tokens=tuple(range(2, 302)), start=0, pages=(1, 2, 0), sampling=SamplingParams())
        StepRunner(self.model, self.arena, progress=progress).run([run])

    def state(self, num_layers: int) -> dict[tuple[str, int], torch.Tensor]:
        return {
            (spec.name, spec.layer): self.arena.view(spec.name, spec.layer).clone()
            for spec in self.arena.layout.kv.specs
            if spec.layer < num_layers
        }


@pytest.mark.parametrize("size", [1, 2])
def test_layers_that_are_told_of_are_in_the_pages_of_every_rank(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other rank stores a layer only when rank 0 has begun to attend to it: as late as it ever can."""
    write_random_checkpoint(tmp_path, 3)
    ranks: dict[int, Rank] = {}
    told: list[tuple[int, list[dict[tuple[str, int], torch.Tensor]]]] = []
    attending = [threading.Event() for _ in range(4)]
    store, attend = model.store, model.attend

    def late_store(x: torch.Tensor, layer: int, *rest: object) -> object:
        if current_rank.number > 0:
            assert attending[layer].wait(30)
        return store(x, layer, *rest)

    def told_attend(asked: object, blocks: object, layer: int, *rest: object) -> torch.Tensor:
        if current_rank.number == 0:
            attending[layer].set()
        return attend(asked, blocks, layer, *rest)

    monkeypatch.setattr(model, "store", late_store)
    monkeypatch.setattr(model, "attend", told_attend)
    current_rank = threading.local()

    def work(group: Group) -> None:
        current_rank.number = group.rank
        ranks[group.rank] = rank = Rank(tmp_path, group)
        group.sum(torch.zeros(1))  # all are there
        rank.compute(lambda _, __, groups: told.append((groups, [ranks[i].state(groups) for i in range(size)])))

    run_ranks(size, work)
    assert [groups for groups, _ in told] == [1, 2, 3, 4]
    for groups, seen in told:
        for rank, state in enumerate(seen):
            for key, value in ranks[rank].state(groups).items():
                assert torch.equal(value.view(torch.uint8), state[key].view(torch.uint8)), (groups, rank, key)


class Kernels:
    """What stands for a GPU's event where there is none: it has happened when the test says so."""

    def __init__(self, *, blocking: bool) -> None:
        assert blocking, "a wait that spins would take a core"
        self.ended = threading.Event()
        self.error = ""
        recorded.append(self)

    def record(self, stream: object) -> None:
        assert stream == "the step's stream"

    def synchronize(self) -> None:
        assert self.ended.wait(30)
        if self.error:
            raise RuntimeError(self.error)


recorded: list[Kernels] = []


def test_on_a_gpu_nothing_is_told_before_its_kernels_have_ended_and_nobody_waits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Kernels)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: "the step's stream")
    recorded.clear()
    told: queue.SimpleQueue[tuple[RequestId, int, int]] = queue.SimpleQueue()
    progress = LayerProgress((0, 3, 5), 6, torch.device("cuda", 0), lambda *what: told.put(what))
    stored = progress.of([run_of(ONE, 300, is_last=True)])
    assert stored is not None
    for layer in range(6):
        stored(layer + 1)  # returns, although no kernel has ended
    assert len(recorded) == 3
    assert told.empty()
    recorded[1].ended.set()  # out of order, as no stream would: still the first is waited for
    recorded[0].ended.set()
    assert [told.get(timeout=30) for _ in range(2)] == [(ONE, 400, 1), (ONE, 400, 2)]
    recorded[2].error = "an illegal memory access"
    recorded[2].ended.set()
    again = progress.of([run_of(TWO, 300, is_last=True)])
    assert again is not None
    again(3)
    recorded[3].ended.set()
    assert told.get(timeout=30) == (TWO, 400, 1), "of the failed kernels nothing is told"
