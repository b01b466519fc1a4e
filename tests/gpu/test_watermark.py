"""Whoever is told of progress may read the pages: a step returns only when the kernels that wrote them have ended."""

import torch

from pdkv.m3.config import kv_layout
from pdkv.m3.requests import RequestId
from pdkv.m3.run import Run
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout

from .models import GPU, gpu_model, small_config

LENGTH = 4096


def test_a_chunk_that_chooses_no_token_has_been_written_when_its_step_returns() -> None:
    """Nothing of its result is wanted on the host, so nothing but a fence waits for its kernels."""
    config = small_config("bfloat16")
    arena = Arena.allocate(RowLayout.of(kv_layout(config, "fp8", "bfloat16")), 2 * LENGTH // 128, GPU)
    runner = StepRunner(gpu_model(config), arena)
    for start in (0, LENGTH):  # the first one also compiles, which hides much
        pages = tuple(range(-(-(start + LENGTH) // 128)))
        runner.run([Run(id=RequestId(b"r"), tokens=(7,) * LENGTH, start=start, pages=pages, sampling=None)])
        assert torch.cuda.current_stream(GPU).query(), "kernels that write pages are still under way"
