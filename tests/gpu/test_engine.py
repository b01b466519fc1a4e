"""Link chasing on a GPU: undivided, and from a prefill to a decode process over the GPU's own memory."""

import json
from pathlib import Path

import msgspec
import pytest
import torch

from pdkv.daemons.gpu_order import VARIABLE
from pdkv.daemons.link import WorkerSettings
from pdkv.daemons.worker_settings import worker_settings
from pdkv.errors import CapacityError, PdkvError
from pdkv.m3.model import load_model
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.link_chasing import make_prompt
from pdkv.verify.undivided import complete_with

LENGTH = 3000
NUM_TOKENS = 64
STORED = [("bfloat16", "bfloat16"), ("fp8", "fp8"), ("fp8_unit", "bfloat16")]


@pytest.mark.parametrize(("dtype", "stored"), [("float32", ("float32", "float32")), *[("bfloat16", s) for s in STORED]])
def test_undivided_finds_every_link(checkpoint: Path, dtype: str, stored: tuple[str, str]) -> None:
    prompt = make_prompt(1, LENGTH)
    model = load_model(checkpoint, device="cuda", dtype=dtype)
    answer = complete_with(model, prompt.token_ids, NUM_TOKENS, ignore_eos=True, prefill_chunk=1024, stored=stored)
    assert answer.token_ids == prompt.expected(NUM_TOKENS)


def _settings(role: str, checkpoint: Path, **changes: object) -> WorkerSettings:
    plain = worker_settings(role, checkpoint, LENGTH + NUM_TOKENS + 8, 0, 1024)
    here = {
        "device": "cuda",
        "dtype": "bfloat16",
        "transport": "auto",
        "require_transport": "cuda_ipc",
        "gpu_memory_utilization": 0.1,
        "num_threads": 2,
    }
    return msgspec.structs.replace(plain, **{**here, **changes})


@pytest.mark.parametrize(("transport", "stored"), [("nvlink", STORED[0]), *[("auto", stored) for stored in STORED]])
def test_divided_finds_every_link_over_the_memory_of_one_gpu(
    checkpoint: Path, transport: str, stored: tuple[str, str]
) -> None:
    prompt = make_prompt(2, LENGTH)
    kinds: dict[str, object] = {"kv_dtype": stored[0], "index_dtype": stored[1], "transport": transport}
    if stored[0] != "fp8_unit":  # which takes what the GPU has room for; with so many told, both start at once
        kinds["num_pages"] = 40
    prefill = _settings("prefill", checkpoint, **kinds)
    decode = _settings("decode", checkpoint, speculative_tokens=3 if stored[0] == "fp8" else 0, **kinds)
    with ProcessPair(prefill, decode) as pair:
        answer = pair.ask(prompt.token_ids, NUM_TOKENS)
    assert answer.token_ids == prompt.expected(NUM_TOKENS)
    assert answer.report.path == "cuda_ipc"
    assert answer.report.num_pages == -(-LENGTH // 128)


@pytest.mark.multi_gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("gpus", ["0,1", "1,0"])
def test_divided_finds_every_link_across_two_gpus(checkpoint: Path, gpus: str) -> None:
    """P and D see both GPUs, each its own first, as `pdkv up` has it."""
    prompt = make_prompt(2, LENGTH)
    order = gpus.split(",")
    prefill, decode = (_settings(role, checkpoint, num_pages=40) for role in ("prefill", "decode"))
    variables = [{VARIABLE: ",".join(places)} for places in (order, reversed(order))]
    with ProcessPair(prefill, decode, variables) as pair:
        answer = pair.ask(prompt.token_ids, NUM_TOKENS)
    assert answer.token_ids == prompt.expected(NUM_TOKENS)
    assert answer.report.path == "cuda_ipc"


def test_weights_that_do_not_fit_are_refused_by_how_much(checkpoint: Path, tmp_path: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    config = {**config, "vocab_size": 400_000_000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CapacityError, match=r"bytes of weights, and .* are free on cuda:0: .* too few. Divide"):
        load_model(tmp_path, device="cuda:0", dtype="bfloat16", load_format="dummy")


def test_pages_that_do_not_fit_are_refused_by_how_much(checkpoint: Path) -> None:
    total = torch.cuda.get_device_properties(0).total_memory
    longest = total // 1000  # more than 1,000 bytes a token
    settings = _settings("prefill", checkpoint, max_model_len=longest)
    with pytest.raises(PdkvError, match=r"bytes too few. Lower --max-model-len"):
        ProcessPair(settings, settings)
