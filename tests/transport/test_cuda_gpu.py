"""What is asked of NVIDIA's driver, over one with two GPUs made of host memory; the real one is tried in tests/gpu."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("cuda.bindings", reason="needs cuda-bindings")

DRIVER = Path(__file__).parent / "native" / "two_gpus.c"

PROGRAM = """
import ctypes
import numpy as np
from cuda.bindings import driver as cuda
from pdkv.errors import TransportError
from pdkv.transport import cuda_gpu
from pdkv.transport.cuda_gpu import CudaGpu
from pdkv.transport.gpu import GpuSpans

def told(answer):
    assert int(answer[0]) == 0, answer[0]
    return answer[-1]

def allocate(gpu, size):
    told(cuda.cuCtxSetCurrent(told(cuda.cuDevicePrimaryCtxRetain(gpu))))
    return int(told(cuda.cuMemAlloc(size)))

def bytes_at(address, size):
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

told(cuda.cuInit(0))
second, first = allocate(1, 1000), allocate(0, 1000)  # the first GPU is current from here on
cuda_gpu.compile_kernel = lambda architecture: architecture.encode()
gpu = CudaGpu.of(second + 5)
"""

ENDING = """
assert int(told(cuda.cuCtxGetCurrent())) == 1, "another context is current than before"
"""


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("driver")
    command = ["gcc", "-O1", "-shared", "-fPIC", str(DRIVER), "-o", str(place / "libcuda.so.1")]
    subprocess.run([*command, "-Wall", "-Wextra", "-Werror"], check=True)
    return place


def run(libraries: Path, program: str, version: int = 13000) -> None:
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(libraries),
        "TWO_GPUS_VERSION": str(version),
        "PYTHONPATH": os.pathsep.join(place or os.curdir for place in sys.path),
    }
    subprocess.run([sys.executable, "-c", PROGRAM + program + ENDING], check=True, env=environment)


def test_finds_the_gpu_that_holds_the_memory(libraries: Path) -> None:
    """cuda-bindings 13.3 says that all memory is the first GPU's, and then nothing is found there."""
    program = """
assert gpu.uuid == "02" * 16
assert gpu.holds(second, 1000)
assert not gpu.holds(second + 5, 1000)
assert not gpu.holds(first, 10)
exported = gpu.export(second + 5)
assert (len(exported.handle), exported.offset) == (64, 5)
"""
    run(libraries, program)


def test_tells_which_gpus_it_can_read(libraries: Path) -> None:
    program = """
assert gpu.refusal("01" * 16) == gpu.refusal("02" * 16) == gpu.refusal("elsewhere") == ""
assert "no peer access" in CudaGpu.of(first).refusal("02" * 16)
"""
    run(libraries, program)


@pytest.mark.parametrize("version", [12080, 13000, 13020])
def test_maps_and_copies_a_batch_in_its_own_context(libraries: Path, version: int) -> None:
    program = """
assert gpu.can_copy_batches
bytes_at(first, 1000)[:] = np.arange(1000) % 251
mapped = gpu.map(CudaGpu.of(first).export(first).handle)
stream = gpu.make_stream()
starts, lengths = np.array([3, 700]), np.array([10, 300])
gpu.copy(GpuSpans(starts + second, starts + mapped, lengths), stream)
gpu.wait(gpu.mark(stream))
wanted = np.zeros(1000, np.uint8)
wanted[3:13], wanted[700:] = bytes_at(first, 1000)[3:13], bytes_at(first, 1000)[700:]
assert np.array_equal(bytes_at(second, 1000), wanted)
table = gpu.make_table(8)
table.numbers[:6] = [3, 30, 10, 700, 70, 300]
gpu.gather(table, 2, 8, 4, stream)
gpu.drop_table(table), gpu.drop_stream(stream), gpu.unmap(mapped), gpu.close()
"""
    run(libraries, program, version)


def test_says_what_the_driver_refuses(libraries: Path) -> None:
    program = """
try:
    CudaGpu.of(first).map(bytes(64))
except TransportError as error:
    assert str(error) == "CUDA refuses: CUDA_ERROR_INVALID_CONTEXT (refused)", error
else:
    raise AssertionError("a handle was opened where it cannot be")
assert not CudaGpu(0).can_copy_batches
"""
    run(libraries, program, 12020)
