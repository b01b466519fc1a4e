"""A cable that is pulled out in mid-read: TCP says nothing of it, and the read ends all the same."""

import msgspec
import pytest

from pdkv.transport.base import ReadStatus
from pdkv.transport.conformance_rig import Rig
from pdkv.transport.conformance_target import TransportSpec
from tests.transport.namespaces import ip, make_namespace


@pytest.fixture
def far():
    yield from make_namespace()


@pytest.mark.timeout(200)
def test_reads_over_a_cut_link_end(far):
    argument = msgspec.json.encode({"listen": "0.0.0.0", "advertise": far.address}).decode()
    spec = TransportSpec("pdkv.transport.conformance:make_sockets", argument, prefix=far.prefix)
    with Rig(spec) as rig:
        target = rig.target()
        peer = rig.connect(target)
        rig.read_well(peer, target, rig.span(0, 0, 0, 1 << 20))
        ip("link", "set", far.cable, "down")
        completion = rig.wait(rig.submit(peer, rig.span(0, 0, 1 << 20, 8 << 20)))[0]
        assert completion.status is ReadStatus.FAILED
        assert "the peer is gone" in completion.error
