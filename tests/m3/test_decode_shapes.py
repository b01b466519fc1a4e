"""Decode steps in fixed shapes, one by one on a CPU: what fills a shape up changes no answer and no stored byte."""

import pytest
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
from tests.gpu.models import cpu_model, small_config
from tests.m3.going_on import check_going_on

NUM_PAGES = 24
GREEDY = SamplingParams()
SHAPES = DecodeShapes.of(EngineSettings(max_model_len=900, max_batch=5, speculative_tokens=3), 128, NUM_PAGES)


@pytest.fixture(scope="module")
def model() -> M3Model:
    return cpu_model(small_config("float32"))


class Side:
    """An arena with three prompts in it."""

    def __init__(self, model: M3Model, kv_dtype: str) -> None:
        self.arena = Arena.allocate(RowLayout.of(kv_layout(model.config, kv_dtype, "float32")), NUM_PAGES)
        self.arena.rows().fill_(0xFF)  # NaN in every format
        self.runner = StepRunner(model, self.arena)
        for number, length in enumerate((650, 2, 127)):
            tokens = tuple(i * 7 % 380 for i in range(length))
            self.runner.run([run(number, tokens, 0, sampling=None)])


def run(number: int, tokens: tuple[int, ...], start: int, sampling: SamplingParams | None = GREEDY) -> Run:
    """Of sequence ``number``, whose pages are every third one, from the end."""
    pages = tuple(NUM_PAGES - 2 - number - 3 * block for block in range(-(-(start + len(tokens)) // 128)))
    num_drafts = len(tokens) - 1 if sampling else 0
    return Run(
        id=RequestId(bytes([number])), tokens=tokens, start=start, pages=pages, sampling=sampling, num_drafts=num_drafts
    )


STEPS = [
    [run(0, (5,), 650)],
    [run(2, (6,), 127), run(1, (7,), 2), run(0, (8,), 651)],  # filled up with one empty sequence
    [run(1, (9,), 3), run(2, (10, 11, 12), 128), run(0, (13, 14, 15, 16), 652)],  # rows before the text's beginning
    [run(0, (17, 18), 653), run(1, (19, 20), 4)],  # proposals were refused; pages of another sequence were in the row
]


@pytest.mark.parametrize("kv_dtype", ["float32", "fp8"])
def test_equal_steps_that_are_not_filled_up(model: M3Model, kv_dtype: str) -> None:
    plain, shaped = Side(model, kv_dtype), Side(model, kv_dtype)
    graphs = DecodeGraphs(model, shaped.arena, SHAPES, replays=False)
    for number, runs in enumerate(STEPS):
        assert graphs.takes(runs)
        wanted = [sample for sample in plain.runner.run(runs).samples if isinstance(sample, Sample)]
        flight = graphs.launch(runs)
        found = [sample for sample in flight.wait().samples() if sample is not None]
        assert [s.token for s in found] == [s.token for s in wanted], number
        assert [s.logprob for s in found] == pytest.approx([s.logprob for s in wanted], abs=1e-4), number
        assert flight.hidden().shape == (len(wanted), model.config.hidden_size)
        if kv_dtype == "float32":  # in fp8 sums of another order may round to a neighbour
            for region in plain.arena.regions():
                mine, its = (side.arena.view(region.name, region.layer) for side in (shaped, plain))
                torch.testing.assert_close(mine, its, atol=1e-4, rtol=1e-4, equal_nan=True)


def test_steps_that_say_as_little_as_can_be(model: M3Model) -> None:
    ahead, waiting = Side(model, "float32"), Side(model, "float32")
    graphs = [DecodeGraphs(model, side.arena, SHAPES, replays=False) for side in (ahead, waiting)]
    check_going_on(graphs[0], graphs[1], run, (650, 2, 126))
    assert torch.equal(ahead.arena.rows(), waiting.arena.rows())


def test_steps_that_do_not_fit_are_left_to_others(model: M3Model) -> None:
    arena = Arena.allocate(RowLayout.of(kv_layout(model.config)), NUM_PAGES)
    graphs = DecodeGraphs(model, arena, SHAPES, replays=False)
    assert not graphs.takes([])
    assert not graphs.takes([run(0, (5,), 1)] * 6), "more sequences than any shape has"
    assert not graphs.takes([run(0, (1, 2, 3, 4, 5), 1)]), "more rows than any shape has"
    assert not graphs.takes([run(0, (1, 2), 0, sampling=None)]), "a prompt's chunk wants no token behind each row"
    assert not graphs.takes([run(0, (1,), 1100)]), "more pages than a row of the table holds"


def test_shapes_waste_little() -> None:
    shapes = DecodeShapes.of(EngineSettings(max_model_len=1 << 20, max_batch=50, speculative_tokens=3), 128, 700)
    assert shapes.batch_sizes == (1, 2, 4, 8, 16, 24, 32, 40, 48, 50)
    assert shapes.query_lens == (1, 4)
    assert shapes.max_blocks == 700
