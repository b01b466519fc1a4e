"""The rest of the conformance kit over NIXL: all checks by TCP and by UCX's shared memory."""

import pytest

from pdkv.transport.conformance import check_names, run_check
from pdkv.transport.conformance_target import TransportSpec
from tests.transport.forked import ForkedTarget
from tests.transport.test_nixl import SPECS, WHERE_PATHS_DIFFER, needs_nixl

CASES = [
    pytest.param(SPECS[label], name, id=f"{label}-{name}")
    for label in ("tcp", "posix")
    for name in check_names(SPECS[label])
    if name not in WHERE_PATHS_DIFFER
]


@needs_nixl
@pytest.mark.parametrize(("spec", "name"), CASES)
def test_conforms(spec: TransportSpec, name: str):
    run_check(spec, name, ForkedTarget)
