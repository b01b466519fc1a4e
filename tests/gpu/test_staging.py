"""GPU memory by every transport that can carry it between two processes of one GPU: each passes the whole kit."""

import time

import msgspec
import pytest
import torch

from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance import TransportSpec, check_names, run_check
from pdkv.transport.conformance_rig import Rig
from pdkv.transport.conformance_target import PATIENCE_S
from pdkv.transport.sealed import seal, unseal
from pdkv.transport.ucx import _MAGIC, _Worker
from pdkv.transport.ucx_library import find_ucx_library

from . import memory

KIT = "pdkv.transport.conformance"
MEMORY = "pdkv.transport.conformance_memory:CudaArray"

STAGED = TransportSpec(factory=f"{KIT}:make_sockets", path="tcp", memory=MEMORY)
UCX = TransportSpec(factory=f"{KIT}:make_ucx", argument='{"cuda": true}', path="cuda_ipc", memory=MEMORY)
UCX_ON_ANOTHER = msgspec.structs.replace(UCX, prefix=("env", "CUDA_VISIBLE_DEVICES=1"))


@pytest.mark.parametrize("name", check_names(STAGED))
def test_sockets_stage_gpu_memory(name: str):
    run_check(STAGED, name)


@pytest.mark.parametrize("name", check_names(UCX))
def test_ucx_reads_gpu_memory(name: str):
    find_ucx_library(cuda=True)  # says what to install
    run_check(UCX, name)


@pytest.mark.multi_gpu(2)
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two NVIDIA GPUs")
@pytest.mark.parametrize("name", check_names(UCX_ON_ANOTHER))
def test_ucx_reads_across_gpus(name: str):
    run_check(UCX_ON_ANOTHER, name)


def test_ucx_reads_no_mapping_whose_maker_cannot_be_watched():
    """Its bytes would come just as well after the death of the process that they belonged to."""
    with Rig(UCX) as rig:
        address = rig.target().address
        worker = msgspec.msgpack.decode(unseal(_MAGIC, address.address, ""), type=_Worker)
        unseen = seal(_MAGIC, msgspec.msgpack.encode(msgspec.structs.replace(worker, home=None)))
        peer = rig.reader.connect(msgspec.structs.replace(address, address=unseen))
        read = rig.wait(rig.submit(peer, rig.span(0, 0, 0, 4096)))[0]
        assert read.status is ReadStatus.FAILED
        assert "UCX maps its memory, and its process cannot be watched from here" in read.error


def test_ucx_lets_go_of_the_memory_of_an_idle_peer_that_dies():
    """As long as it is mapped, the GPU keeps it, and a worker that starts again finds no room."""
    huge = msgspec.structs.replace(UCX, memory=f"{memory.__name__}:make_huge")
    with Rig(huge) as rig:
        target = rig.target()
        rig.read_well(rig.connect(target), target, rig.span(0, 0, 0, 4096))
        before = memory.free_bytes()
        target.kill()
        end = time.monotonic() + PATIENCE_S
        while (freed := memory.free_bytes() - before) < 7 * memory.GIB:
            assert time.monotonic() < end, f"{freed:,} bytes became free"
