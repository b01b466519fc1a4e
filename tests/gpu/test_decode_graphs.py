"""Replayed decode steps against the same steps launched one by one: bit for bit, in tokens and in the arena."""

import torch

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeGraphs, DecodeShapes
from pdkv.m3.model import M3Model
from pdkv.m3.requests import EngineSettings, RequestId
from pdkv.m3.run import Run
from pdkv.m3.sampling import Sample, SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from tests.gpu.models import GPU, gpu_model, small_config
from tests.m3.going_on import check_going_on

NUM_PAGES = 40
GREEDY = SamplingParams()
SHAPES = DecodeShapes.of(EngineSettings(max_model_len=1600, max_batch=5, speculative_tokens=3), 128, NUM_PAGES)


class Side:
    """An arena with three prompts in it, and decode steps over it."""

    def __init__(self, model: M3Model, *, replays: bool) -> None:
        config = model.config
        self.arena = Arena.allocate(RowLayout.of(kv_layout(config, "fp8", "bfloat16")), NUM_PAGES, GPU)
        self.arena.rows().fill_(0xFF)  # NaN in every format
        self.graphs = DecodeGraphs(model, self.arena, SHAPES, replays=replays)
        runner = StepRunner(model, self.arena)
        for number, length in enumerate((700, 130, 1279)):
            runner.run([run(number, tuple(i * 7 % 380 for i in range(length)), 0, sampling=None)])

    def step(self, runs: list[Run]) -> tuple[list[Sample | None], torch.Tensor, torch.Tensor]:
        flight = self.graphs.launch(runs)
        return flight.wait().samples(), flight.hidden(), self.arena.rows()

    def samples(self, runs: list[Run]) -> list[Sample | None]:
        return self.graphs.launch(runs).wait().samples()


def run(number: int, tokens: tuple[int, ...], start: int, sampling: SamplingParams | None = GREEDY) -> Run:
    """Of sequence ``number``, whose pages are every third one, from the end."""
    pages = tuple(NUM_PAGES - 2 - number - 3 * block for block in range(-(-(start + len(tokens)) // 128)))
    return Run(
        id=RequestId(bytes([number])),
        tokens=tokens,
        start=start,
        pages=pages,
        sampling=sampling,
        num_drafts=len(tokens) - 1 if sampling else 0,
    )


STEPS = [
    [run(0, (5,), 700)],
    [run(0, (6,), 701), run(1, (7,), 130), run(2, (8,), 1279)],  # filled up with one empty sequence
    [run(0, (9, 10, 11), 702), run(1, (12, 13), 131), run(2, (14, 15, 16, 17), 1280)],  # of unequal lengths
    [run(2, (18,), 1281), run(1, (19,), 132)],  # proposals were refused, and another order
    [run(1, (20, 21, 22, 23), 133)],
]


def test_replay_equals_eager_bit_for_bit() -> None:
    model = gpu_model(small_config("bfloat16"))
    replayed, eager = Side(model, replays=True), Side(model, replays=False)
    replayed.graphs.prepare()
    assert torch.equal(replayed.arena.rows(), eager.arena.rows()), "preparing wrote into pages"
    for number, runs in enumerate(STEPS):
        found, hidden, rows = replayed.step(runs)
        wanted, wanted_hidden, wanted_rows = eager.step(runs)
        assert found == wanted, number
        assert torch.equal(hidden, wanted_hidden), number
        assert torch.equal(rows, wanted_rows), number


def test_rows_that_fill_up_a_step_change_nothing() -> None:
    model = gpu_model(small_config("bfloat16"))
    mixed, alone = Side(model, replays=True), Side(model, replays=True)
    together = mixed.samples([run(0, (9, 10, 11), 700), run(1, (12,), 130)])
    apart = alone.samples([run(0, (9, 10, 11), 700)]) + alone.samples([run(1, (12,), 130)])
    assert None not in together
    assert [s and s.token for s in together] == [s and s.token for s in apart]


def test_a_transfer_that_lands_between_replays_is_seen_by_the_next() -> None:
    model = gpu_model(small_config("bfloat16"))
    side = Side(model, replays=True)
    before = side.samples([run(0, (5,), 700)])
    elsewhere = run(2, (5,), 700)
    for source, target in zip(run(0, (5,), 700).pages, elsewhere.pages, strict=True):
        side.arena.rows()[target].copy_(side.arena.rows()[source])  # as a read of a peer's pages would
    assert side.samples([elsewhere]) == before


def test_a_graph_takes_its_tokens_from_the_one_before() -> None:
    model = gpu_model(small_config("bfloat16"))
    ahead, waiting = Side(model, replays=True), Side(model, replays=True)
    check_going_on(ahead.graphs, waiting.graphs, run, (700, 130, 1278))
    assert torch.equal(ahead.arena.rows(), waiting.arena.rows())
