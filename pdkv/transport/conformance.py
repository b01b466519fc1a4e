"""The kit that every transport passes: named checks over a transport made from a ``TransportSpec``, no test framework.

    from pdkv.transport.conformance import TransportSpec, run_conformance
    results = run_conformance(TransportSpec(factory="mine.transport:make", path="tcp"))

or ``python -m pdkv.transport.conformance mine.transport:make``. The far end runs in another process, so the factory
must be importable there. ``make_inproc``, ``make_shm``, ``make_sockets``, ``make_auto``, ``make_ucx`` and
``make_nixl`` are the factories of our own transports.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence

import msgspec

from pdkv.errors import PdkvError
from pdkv.transport.base import Transport
from pdkv.transport.conformance_checks import CHECKS, SEPARATE_PROCESS_CHECKS
from pdkv.transport.conformance_rig import ConformanceFailure, Rig, Start
from pdkv.transport.conformance_target import SpawnedTarget, TransportSpec

__all__ = ["CheckResult", "ConformanceFailure", "TransportSpec", "check_names", "run_check", "run_conformance"]


class CheckResult(msgspec.Struct, frozen=True):
    """How one check ended. ``error`` is empty when it passed."""

    name: str
    error: str


def make_inproc(argument: str) -> Transport:
    """Factory of ``inproc``: the argument is empty, or ``Faults`` as JSON."""
    from pdkv.transport.inproc import Faults, InprocTransport  # noqa: PLC0415

    return InprocTransport(msgspec.json.decode(argument, type=Faults) if argument else None)


def make_ucx(argument: str) -> Transport:
    """Factory of ``ucx``: the argument is UCX's list of transports, or ``UcxOptions`` as JSON; empty = the default."""
    from pdkv.transport.ucx import UcxOptions, UcxTransport  # noqa: PLC0415

    if argument.startswith("{"):
        return UcxTransport(msgspec.json.decode(argument, type=UcxOptions))
    return UcxTransport(UcxOptions(tls=argument or None))


def make_nixl(argument: str) -> Transport:
    """Factory of ``nixl``: the argument is one UCX transport, or ``NixlOptions`` as JSON; empty = the default."""
    from pdkv.transport.nixl import NixlOptions, NixlTransport  # noqa: PLC0415

    if argument.startswith("{"):
        return NixlTransport(msgspec.json.decode(argument, type=NixlOptions))
    return NixlTransport(NixlOptions(tls=argument or None))


def make_shm(_argument: str) -> Transport:
    """Factory of ``shm``."""
    from pdkv.transport.shm import ShmTransport  # noqa: PLC0415

    return ShmTransport()


def make_sockets(argument: str) -> Transport:
    """Factory of ``sockets``: the argument is empty, or ``SocketOptions`` as JSON."""
    from pdkv.transport.sockets import SocketOptions, SocketTransport  # noqa: PLC0415

    return SocketTransport(msgspec.json.decode(argument, type=SocketOptions) if argument else None)


def make_auto(_argument: str) -> Transport:
    """Factory of ``auto`` over all ways that need no special hardware."""
    from pdkv.transport.auto import AutoTransport, Way  # noqa: PLC0415
    from pdkv.transport.shm import ShmTransport  # noqa: PLC0415
    from pdkv.transport.sockets import SocketTransport  # noqa: PLC0415
    from pdkv.transport.ucx import UcxTransport  # noqa: PLC0415

    return AutoTransport([Way(ShmTransport(), "shm"), Way(SocketTransport(), "tcp"), Way(UcxTransport(), "tcp")])


def check_names(spec: TransportSpec) -> list[str]:
    """The checks that apply to ``spec``."""
    return [name for name in CHECKS if spec.separate_process or name not in SEPARATE_PROCESS_CHECKS]


def run_check(spec: TransportSpec, name: str, start: Start = SpawnedTarget) -> None:
    """Run one check. Raises ``ConformanceFailure`` saying which promise was broken, or what the transport raised."""
    with Rig(spec, start) as rig:
        CHECKS[name](rig)


def run_conformance(spec: TransportSpec, names: Sequence[str] | None = None) -> list[CheckResult]:
    """Run the named checks, or all that apply, and go on after failures."""
    results = []
    for name in names or check_names(spec):
        error = ""
        try:
            run_check(spec, name)
        except (ConformanceFailure, PdkvError, OSError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        results.append(CheckResult(name, error))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pdkv.transport.conformance", description=__doc__)
    parser.add_argument("factory", help="module:callable that makes the transport")
    parser.add_argument("--argument", default="", help="what the factory is called with")
    parser.add_argument("--path", default=None, help="the path that reads must report")
    parser.add_argument("--prefix", default="", help='before the far end\'s command: "ip netns exec NAME"')
    parser.add_argument("--memory", default="", help="module:callable that allocates memory, on a GPU for example")
    parser.add_argument("--same-process", action="store_true", help="both ends in one process")
    parser.add_argument("--check", action="append", help="run this check only; may be repeated")
    chosen = parser.parse_args(arguments)
    prefix = tuple(shlex.split(chosen.prefix))
    spec = TransportSpec(chosen.factory, chosen.argument, not chosen.same_process, prefix, chosen.path, chosen.memory)
    failed = 0
    for name in chosen.check or check_names(spec):
        (result,) = run_conformance(spec, [name])
        sys.stdout.write(f"{name}: {result.error or 'passed'}\n")
        failed += bool(result.error)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
