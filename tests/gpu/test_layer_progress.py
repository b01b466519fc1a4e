"""On a GPU layers are told of from a thread that waits for their kernels, whatever the forward is at."""

import threading

import torch

from pdkv.m3.config import kv_layout
from pdkv.m3.layer_progress import LayerProgress, group_starts
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from tests.gpu.models import GPU, gpu_model, small_config

PATIENCE_S = 60.0
State = dict[tuple[str, int], torch.Tensor]


def test_layers_are_told_of_behind_their_kernels() -> None:
    """The GPU is kept busy before the step, so that a word that comes without a wait finds empty pages."""
    model = gpu_model(small_config("bfloat16"))
    layers = model.config.num_layers
    arena = Arena.allocate(RowLayout.of(kv_layout(model.config)), 3, "cuda:0")
    told: list[tuple[int, State]] = []
    more = threading.Condition()
    side = torch.cuda.Stream(GPU)

    def state(num_layers: int) -> State:
        specs = [spec for spec in arena.layout.kv.specs if spec.layer < num_layers]
        return {(spec.name, spec.layer): arena.view(spec.name, spec.layer).clone() for spec in specs}

    def tell(_: RequestId, __: int, groups: int) -> None:
        with torch.cuda.stream(side):  # what a peer would read, in no order with the step's own stream
            seen = state(groups)
        side.synchronize()
        with more:
            told.append((groups, seen))
            more.notify()

    progress = LayerProgress(group_starts(layers, layers), layers, GPU, tell)
    run = Run(id=RequestId(b"1"), tokens=tuple(range(2, 302)), start=0, pages=(1, 2, 0), sampling=SamplingParams())
    runner = StepRunner(model, arena, progress=progress)
    runner.run([run])  # compiles what is compiled at first use
    with more:
        assert more.wait_for(lambda: len(told) == layers, PATIENCE_S)
    told.clear()
    arena.rows().fill_(0xA5)
    torch.cuda._sleep(1_000_000_000)
    runner.run([run])
    with more:
        assert more.wait_for(lambda: len(told) == layers, PATIENCE_S)
    assert [groups for groups, _ in told] == list(range(1, layers + 1))
    for groups, seen in told:
        for key, value in state(groups).items():
            assert torch.equal(value.view(torch.uint8), seen[key].view(torch.uint8)), (groups, key)
