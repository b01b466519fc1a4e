"""Digests of pages on a GPU: the same as a CPU finds, beside what the engine computes, and through a real pair."""

import threading
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from pdkv.daemons.worker_settings import worker_settings
from pdkv.schema import VerifyPages
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.link_chasing import make_prompt
from tests.memory.test_page_digests import digests, filled

LENGTH, NUM_TOKENS = 3000, 24
PATIENCE_S = 60.0


def test_a_gpu_finds_what_a_cpu_finds() -> None:
    assert (digests(filled(device="cuda:0")) == digests(filled())).all()


def test_the_engines_stream_is_not_waited_for() -> None:
    """Digests come while a kernel of the thread that computes is still running."""
    arena = filled(device="cuda:0")
    expected = digests(arena)  # compiled
    stream, found = torch.cuda.current_stream(), list[np.ndarray]()
    ended = torch.cuda.Event()
    torch.cuda._sleep(10_000_000_000)  # some seconds
    ended.record(stream)
    thread = threading.Thread(target=lambda: found.append(digests(arena)))
    thread.start()
    thread.join(PATIENCE_S)
    is_running = not ended.query()
    torch.cuda.synchronize()
    assert (found[0] == expected).all()
    assert is_running


@pytest.mark.parametrize("verify", [VerifyPages.SAMPLE, VerifyPages.FULL])
def test_a_pair_that_compares_answers_as_without(checkpoint: Path, verify: VerifyPages) -> None:
    plain = worker_settings("prefill", checkpoint, LENGTH + NUM_TOKENS + 8, 40, 1024)
    prefill = msgspec.structs.replace(
        plain,
        device="cuda",
        dtype="bfloat16",
        kv_dtype="fp8",
        index_dtype="fp8",
        transport="auto",
        require_transport="cuda_ipc",
        gpu_memory_utilization=0.1,
        num_threads=2,
    )
    decode = msgspec.structs.replace(prefill, role="decode", name="decode", verify_pages=verify)
    with ProcessPair(prefill, decode) as pair:
        for seed in (1, 2):
            prompt = make_prompt(seed, LENGTH)
            assert pair.ask(prompt.token_ids, NUM_TOKENS).token_ids == prompt.expected(NUM_TOKENS)
