"""nvlink passes the kit on a GPU made of host memory: its threads, lives and closes are the real ones."""

import pytest

from pdkv.transport.conformance import check_names, run_check
from pdkv.transport.conformance_target import TransportSpec
from tests.transport.forked import ForkedTarget

HERE = "tests.transport.host_gpu"

SPEC = TransportSpec(factory=f"{HERE}:make", path="cuda_ipc", memory=f"{HERE}:HostGpuMemory")


@pytest.mark.parametrize("name", check_names(SPEC))
def test_conforms(name: str) -> None:
    run_check(SPEC, name, ForkedTarget)


@pytest.mark.parametrize("name", ["reads_scattered_odd_spans", "refuses_bad_ranges"])
def test_conforms_without_batches_of_copies(name: str) -> None:
    run_check(TransportSpec(f"{HERE}:make", "gather", path="cuda_ipc", memory=SPEC.memory), name, ForkedTarget)
