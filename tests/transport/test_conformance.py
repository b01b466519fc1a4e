"""Every transport passes every check of the shipped kit: inproc, shm, sockets, UCX over TCP and over shared memory."""

import sys

import pytest

from pdkv.errors import TransportError
from pdkv.transport.conformance import check_names, main, run_check, run_conformance
from pdkv.transport.conformance_rig import ConformanceFailure
from pdkv.transport.conformance_target import TransportSpec
from tests.transport.forked import ForkedTarget

KIT = "pdkv.transport.conformance"

INPROC = TransportSpec(factory=f"{KIT}:make_inproc", separate_process=False, path="inproc")
INPROC_SLOW = TransportSpec(
    factory=f"{KIT}:make_inproc",
    argument='{"seed": 5, "max_delay_polls": 9, "reorder": 0.5}',
    separate_process=False,
    path="inproc",
)
UCX_TCP = TransportSpec(factory=f"{KIT}:make_ucx", argument="tcp", path="tcp")
UCX_SHM = TransportSpec(factory=f"{KIT}:make_ucx", argument="posix,self", path="shm")
SHM = TransportSpec(factory=f"{KIT}:make_shm", path="shm")
SOCKETS = TransportSpec(factory=f"{KIT}:make_sockets", path="tcp")
STAGED = TransportSpec(
    factory=f"{KIT}:make_sockets",
    argument='{"emulated_copy_us": 200}',
    path="tcp",
    memory="pdkv.transport.conformance_memory:HiddenArray",
)
AUTO = TransportSpec(factory=f"{KIT}:make_auto", path="shm")


def cases():
    specs = {
        "inproc": INPROC,
        "inproc-slow": INPROC_SLOW,
        "shm": SHM,
        "sockets": SOCKETS,
        "sockets-staged": STAGED,
        "auto": AUTO,
        "ucx-tcp": UCX_TCP,
        "ucx-shm": UCX_SHM,
    }
    for label, spec in specs.items():
        for name in check_names(spec):
            yield pytest.param(spec, name, id=f"{label}-{name}")


@pytest.mark.parametrize(("spec", "name"), list(cases()))
def test_conforms(spec: TransportSpec, name: str):
    run_check(spec, name, ForkedTarget)


def make_lossy(_argument: str):
    from pdkv.transport.inproc import Faults, InprocTransport

    return InprocTransport(Faults(seed=1, truncate=1.0))


def make_silent(_argument: str):
    from pdkv.transport.inproc import InprocTransport

    class Silent(InprocTransport):
        """Says OK and copies nothing."""

        def _draw(self, peer, batch):
            read = super()._draw(peer, batch)
            read.spans_to_copy = 0
            return read

    return Silent()


@pytest.mark.parametrize(
    ("factory", "promise"), [("make_lossy", "a good read ended as"), ("make_silent", "wrong bytes")]
)
def test_kit_finds_broken_transports(factory: str, promise: str):
    spec = TransportSpec(factory=f"{__name__}:{factory}", separate_process=False)
    with pytest.raises(ConformanceFailure, match=promise):
        run_check(spec, "reads_every_byte")
    results = run_conformance(spec, ["reads_every_byte", "completes_empty_batch"])
    assert promise in results[0].error


def test_command_line_runs_the_kit(capsys: pytest.CaptureFixture[str]):
    arguments = [f"{KIT}:make_inproc", "--same-process", "--check", "closes_twice"]
    assert main(arguments) == 0
    assert main([*arguments, "--path", "rdma", "--check", "tells_its_path"]) == 1
    assert "not rdma" in capsys.readouterr().out


def test_kit_imports_no_test_framework():
    import subprocess

    code = f"import sys, {KIT}; sys.exit('pytest' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_transport_kind_is_an_error():
    with pytest.raises(TransportError, match="cannot reach"):
        run_check_of_foreign_address()


def run_check_of_foreign_address():
    from pdkv.schema import TransportAddress
    from pdkv.transport.inproc import InprocTransport

    transport = InprocTransport()
    try:
        transport.connect(TransportAddress(transport="ucx", address=b"", memories=()))
    finally:
        transport.close()
