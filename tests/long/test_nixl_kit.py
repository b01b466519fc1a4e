"""The whole conformance kit over NIXL, by the way that it chooses and by TCP."""

import pytest

from pdkv.transport.conformance import check_names, run_check
from tests.transport.forked import ForkedTarget
from tests.transport.test_nixl import SPECS, needs_nixl


@needs_nixl
@pytest.mark.parametrize(("label", "name"), [(label, name) for label in SPECS for name in check_names(SPECS[label])])
def test_conforms(label: str, name: str):
    run_check(SPECS[label], name, ForkedTarget)
