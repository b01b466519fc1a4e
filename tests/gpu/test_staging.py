"""GPU memory by every transport that can carry it between two processes of one GPU: each passes the whole kit."""

import pytest

from pdkv.transport.conformance import TransportSpec, check_names, run_check
from pdkv.transport.ucx_library import find_ucx_library

KIT = "pdkv.transport.conformance"
MEMORY = "pdkv.transport.conformance_memory:CudaArray"

STAGED = TransportSpec(factory=f"{KIT}:make_sockets", path="tcp", memory=MEMORY)
UCX = TransportSpec(factory=f"{KIT}:make_ucx", argument='{"cuda": true}', path="cuda_ipc", memory=MEMORY)


@pytest.mark.parametrize("name", check_names(STAGED))
def test_sockets_stage_gpu_memory(name: str):
    run_check(STAGED, name)


@pytest.mark.parametrize("name", check_names(UCX))
def test_ucx_reads_gpu_memory(name: str):
    find_ucx_library(cuda=True)  # says what to install
    run_check(UCX, name)
