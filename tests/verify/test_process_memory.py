"""Peak memory of process trees, of real processes."""

import subprocess
import sys

from pdkv.verify.process_memory import tree_peaks

_CHILD = """
import os, sys
block = bytearray(64 << 20)
for i in range(0, len(block), 4096):
    block[i] = 1
del block
if os.fork() == 0:
    print("ready", flush=True)
    sys.stdin.read()
    os._exit(0)
os.wait()
"""


def test_peaks_of_a_tree_outlive_the_memory_and_count_children() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        peaks = tree_peaks(process.pid)
        process.communicate()
    assert len(peaks) == 2
    assert peaks[0] > 64 << 20, "the block was given back, its peak was not"
    assert peaks[1] < peaks[0]


def test_a_process_that_is_gone_has_no_peaks() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
        assert tree_peaks(process.pid) == []
