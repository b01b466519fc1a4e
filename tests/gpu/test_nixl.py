"""GPU memory by NIXL between two processes of one GPU: the whole kit, where NIXL is installed."""

import msgspec
import pytest
import torch

from pdkv.transport.conformance import TransportSpec, check_names, run_check
from pdkv.transport.conformance_rig import Rig
from pdkv.transport.nixl_agent import HOW_TO_INSTALL, installed_nixl

NIXL = TransportSpec(
    factory="pdkv.transport.conformance:make_nixl",
    path="cuda_ipc",
    memory="pdkv.transport.conformance_memory:CudaArray",
)
NIXL_ON_ANOTHER = msgspec.structs.replace(NIXL, prefix=("env", "CUDA_VISIBLE_DEVICES=1"))

pytestmark = pytest.mark.skipif(not installed_nixl(), reason=f"NIXL is not installed: {HOW_TO_INSTALL}")


@pytest.mark.parametrize("name", check_names(NIXL))
def test_nixl_reads_gpu_memory(name: str):
    run_check(NIXL, name)


def test_nixl_says_how_it_reads_gpu_memory():
    with Rig(NIXL) as rig:
        target = rig.target()
        peer = rig.connect(target)
        rig.read_well(peer, target, rig.span(0, 1, 3, 1_000_003))
        assert "cuda_ipc" in rig.reader.note(peer)
        assert not rig.reader.crawls(peer)


@pytest.mark.multi_gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", check_names(NIXL_ON_ANOTHER))
def test_nixl_reads_across_gpus(name: str):
    run_check(NIXL_ON_ANOTHER, name)
