"""The race over memory of GPUs, small: every contestant is judged from outside, and one that moves nothing is seen."""

import subprocess
import sys

import msgspec
import numpy as np

from pdkv.bench import race
from pdkv.bench.geometry import Workload
from pdkv.bench.gpu_ground import GpuGround
from pdkv.bench.memories import gpu_names

PLAN = race.Plan(Workload(512), (race.GPU_PATH,), repeats=2)
NUM_BYTES = 4 << 20
"""Of two memories of one process: the driver would take smaller ones from one block, and hand out that as a whole."""

CHILD = """
import sys
import msgspec, numpy as np
from pdkv.bench.memories import GpuPlace, allocate, handle_of
from pdkv.bench.memcpy_mover import PeerCopyMover
from pdkv.bench.mover import READER, Role

gpu, num_bytes = map(int, sys.argv[1:])
source, reader = allocate(GpuPlace(0, num_bytes)), allocate(GpuPlace(gpu, num_bytes))
print(handle_of(source).hex(), handle_of(reader).hex(), flush=True)
mover = PeerCopyMover(Role("memcpy", READER), reader)
mover.meet(msgspec.json.encode(source))
for line in sys.stdin:
    mover.load(np.array([[0], [0], [int(line)]]))
    mover.move()
    print(flush=True)
"""


def test_our_transport_and_the_ceiling_move_every_byte():
    report = race.run(PLAN, lambda _: None)
    assert len(report.gpus) == 2
    for result in report.results:
        assert result.correct, result.error
        assert result.path == ("memcpy" if result.contestant == "ceiling" else "cuda_ipc")
    assert {(result.contestant, result.layout) for result in report.results} == {
        (name, layout) for name in ("ceiling", "pdkv") for layout in ("arena", "per-layer")
    }


def test_rivals_without_a_way_or_tools_are_told():
    report = race.run(
        msgspec.structs.replace(PLAN, rivals=("nixl", "mooncake"), tools=PLAN.tools / "nowhere", layouts=("arena",)),
        lambda _: None,
    )
    assert report.left_out == ("mooncake has no way over cuda_ipc",)
    assert [result.correct for result in report.results if result.contestant == "nixl"] == [False]


def test_what_a_reader_lacks_is_seen_in_another_processes_memory():
    """The judge of a child's memories; a child moves half of the bytes."""
    gpu = len(gpu_names()) - 1
    command = [sys.executable, "-c", CHILD, str(gpu), str(NUM_BYTES)]
    child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        judge = GpuGround(0, gpu, NUM_BYTES).judge(*map(bytes.fromhex, child.stdout.readline().split()))
        judge.poison()
        for moved, wrong in ((NUM_BYTES // 2, 1), (NUM_BYTES, 0)):
            child.stdin.write(f"{moved}\n")
            child.stdin.flush()
            child.stdout.readline()
            halves = np.array([[0, NUM_BYTES // 2], [0, NUM_BYTES // 2], [NUM_BYTES // 2] * 2])
            assert judge.num_wrong(halves) == wrong
        judge.close()
    finally:
        child.communicate(timeout=60)
