"""The rest of the conformance kit over NIXL: all checks by TCP."""

import pytest

from pdkv.transport.conformance import check_names, run_check
from tests.transport.forked import ForkedTarget
from tests.transport.test_nixl import SPECS, WHERE_PATHS_DIFFER, needs_nixl

NAMES = [name for name in check_names(SPECS["tcp"]) if name not in WHERE_PATHS_DIFFER]


@needs_nixl
@pytest.mark.parametrize("name", NAMES)
def test_conforms(name: str):
    run_check(SPECS["tcp"], name, ForkedTarget)
