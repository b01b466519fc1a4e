"""Two network namespaces of one host: TCP over the cable between them, and memory that is mapped all the same."""

import msgspec
import pytest

from pdkv.transport.conformance import run_check
from pdkv.transport.conformance_target import TransportSpec

from .namespaces import make_namespace

KIT = "pdkv.transport.conformance"


@pytest.fixture(scope="module")
def far():
    yield from make_namespace()


@pytest.mark.parametrize(
    "check", ["reads_every_byte", "reads_scattered_odd_spans", "fails_when_killed_during", "closes_stopped_peer"]
)
def test_sockets_between_namespaces(far, check):
    argument = msgspec.json.encode({"listen": "0.0.0.0", "advertise": far.address}).decode()
    run_check(TransportSpec(f"{KIT}:make_sockets", argument, prefix=far.prefix, path="tcp"), check)


@pytest.mark.parametrize("check", ["tells_its_path", "reads_scattered_odd_spans", "fails_when_killed_after"])
def test_memory_is_mapped_across_namespaces(far, check):
    """By /proc: the unix socket is out of reach, but processes see each other."""
    run_check(TransportSpec(f"{KIT}:make_shm", prefix=far.prefix, path="shm"), check)
