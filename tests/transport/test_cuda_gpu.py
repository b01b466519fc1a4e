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
import os
import numpy as np
from cuda.bindings import driver as cuda
from pdkv.errors import TransportError
from pdkv.transport import cuda_gpu
from pdkv.transport.cuda_gpu import CudaGpu
from pdkv.transport.nvlink_spans import Bounds, Driver, Ends, Posting, Watch

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
streams, event = (gpu.make_stream(), gpu.make_stream()), gpu.make_event()
driver = Driver(gpu.calls())
pace = (100, 64, 1, 16, 1, 2, 64, 4, 1)  # rows have 100 bytes or more
with_life, its_end = os.pipe()
posting = Posting(driver, Bounds([1000], [(second, 1000)]), np.array([mapped]), pace, streams, with_life)
zeros, starts, lengths = np.zeros(2, np.int64), np.array([3, 700]), np.array([110, 300])
assert posting.post(zeros, starts, starts + second, lengths) == 0
assert (posting.used, posting.num_bytes) == (1, 410)
assert posting.mark(event, 0) == 0
ends = Ends()
watch = Watch(driver, ends)
for read in range(3):
    watch.add(read, (event,), 1 << 30, False, 0)  # as if the first had taken since the machine was started
watch.stop()
watch.join()
assert ends.take() == [(0, 0), (1, 0), (2, 0)]
wanted = np.zeros(1000, np.uint8)
wanted[3:113], wanted[700:] = bytes_at(first, 1000)[3:113], bytes_at(first, 1000)[700:]
assert np.array_equal(bytes_at(second, 1000), wanted)

table = gpu.make_table(8)
assert posting.post(zeros, starts, starts + second, np.array([70, 30])) == 1  # it wants a table
assert posting.give(table.numbers, table.device) == 1  # the second span is a part of its own
made = [[3 + second, 3 + mapped, 64], [67 + second, 67 + mapped, 6]]
sent = np.frombuffer(bytes_at(table.device, 48), np.int64).reshape(2, 3).tolist()
assert sorted(sent) == made, sent
other = gpu.make_table(8)
assert posting.give(other.numbers, other.device) == 0
assert np.frombuffer(bytes_at(other.device, 24), np.int64).tolist() == [700 + second, 700 + mapped, 30]
gpu.drop_table(table), gpu.drop_table(other), gpu.drop_event(event), gpu.unmap(mapped), gpu.close()
[gpu.drop_stream(stream) for stream in streams]
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
