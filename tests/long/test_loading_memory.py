"""Peak memory of loading one rank's share of a checkpoint, in a process that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import MiniMaxM3VLTextConfig

from pdkv.m3.config import load_config
from pdkv.m3.sharding import model_share
from pdkv.m3.tensor_names import NAMINGS, all_parts
from pdkv.m3.weights import weight_bytes
from tests.checkpoints import SMALL, released_config, write_shards
from tests.m3.mxfp8_checkpoint import PLAIN, QUANTIZATION

MIB = 1 << 20
MARGIN = 80 * MIB
"""32 MiB of mapped files, copies of some rows while they are made, and what an allocator keeps."""

_LOAD = """
import sys, torch
from pathlib import Path
from pdkv.m3.model import load_model
from pdkv.m3.parallel import thread_groups

def memory(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

directory, rank, size, whole_experts = sys.argv[1], *map(int, sys.argv[2:])
torch.ones(8, 8) @ torch.ones(8, 8)
before = memory("VmRSS")
assert memory("VmHWM") < before + (8 << 20), "importing has taken more than is kept"
model = load_model(Path(directory), group=thread_groups(size)[rank], expert_parallel=bool(whole_experts))
print(memory("VmHWM") - before)
"""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Some 100 million weights in bfloat16 and in MXFP8, in released names and four shards."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {
        "vocab_size": 30_000, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 64, "index_head_dim": 64,
        "rotary_dim": 32, "intermediate_size": 512, "dense_intermediate_size": 4096, "shared_intermediate_size": 512,
        "num_local_experts": 8,
    }  # fmt: skip
    raw = released_config(MiniMaxM3VLTextConfig(**{**SMALL, **sizes}).to_dict() | {"dtype": "bfloat16"})
    for kind in ("bf16", "mxfp8"):
        directory = folder / kind
        directory.mkdir()
        quantization = {"quantization_config": QUANTIZATION} if kind == "mxfp8" else {}
        (directory / "config.json").write_text(json.dumps(raw | quantization))
        tensors: dict[str, torch.Tensor] = {}
        for name, part in all_parts(NAMINGS[2], load_config(directory)).items():
            if kind == "bf16" or name.endswith(PLAIN):
                tensors[name] = torch.full(part.shape, 0.01, dtype=torch.bfloat16)
            else:
                tensors[name] = torch.full(part.shape, 1.5).to(torch.float8_e4m3fn)
                rows, columns = part.shape
                tensors[f"{name}_scale_inv"] = torch.full((rows, columns // 32), 120, dtype=torch.uint8)
        write_shards(directory, tensors, 4)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.parametrize("kind", ["bf16", "mxfp8"])
def test_a_rank_takes_little_more_memory_than_its_share(checkpoints: dict[str, Path], kind: str):
    directory = checkpoints[kind]
    stored = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    config = load_config(directory)
    print(f"\n{kind}: {stored / MIB:.0f} MiB in files; share and peak of loading, MiB, held in float32:")  # noqa: T201
    for size, whole_experts in ((1, False), (2, False), (4, False), (4, True)):
        share = weight_bytes(config, model_share(config, size - 1, size, whole_experts), 4)
        arguments = [str(directory), str(size - 1), str(size), str(int(whole_experts))]
        done = subprocess.run([sys.executable, "-c", _LOAD, *arguments], check=True, capture_output=True, text=True)
        peak = int(done.stdout)
        print(f"  TP {size}{' EP' if whole_experts else ''}: {share / MIB:6.0f} {peak / MIB:6.0f}")  # noqa: T201
        assert share < peak < share + MARGIN, (share, peak)
