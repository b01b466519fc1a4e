"""Far ends of the conformance kit that start at once: forked off a server that has loaded what they need."""

import os
import select
import signal
import socket
import sys

import msgspec

from pdkv.schema import TransportAddress
from pdkv.transport.conformance_target import PATIENCE_S, TransportSpec, serve
from tests.forkserver import FORKED


class ForkedTarget:
    """As ``SpawnedTarget``, for a quarter of the processor time. That one is used across namespaces and on GPUs."""

    def __init__(self, spec: TransportSpec, seed: int) -> None:
        self.seed = seed
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._process = FORKED.Process(target=_run, args=(spec, seed, theirs, dict(os.environ)))
            self._process.start()
            self._lines = self._socket.makefile("rb")
            self.address = msgspec.json.decode(self.answer(), type=TransportAddress)

    def send(self, line: str) -> None:
        self._socket.sendall(line.encode() + b"\n")

    def has_answered(self) -> bool:
        return self._has_line(0)

    def answer(self) -> bytes:
        if not self._has_line(PATIENCE_S):
            raise TimeoutError("the conformance target does not answer")
        line = self._lines.readline()
        if not line:
            raise ChildProcessError("the conformance target ended; its standard error says why")
        return line

    def stop(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._reap()

    def close(self) -> None:
        if self._socket.fileno() < 0:
            return
        if self._process.is_alive():
            self.resume()
        self._socket.shutdown(socket.SHUT_WR)
        self._reap()
        if self._process.exitcode != 0:
            raise ChildProcessError(f"the conformance target ended by itself with status {self._process.exitcode}")

    def _has_line(self, timeout_s: float) -> bool:
        return bool(select.select([self._socket], [], [], timeout_s)[0])

    def _signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def _reap(self) -> None:
        self._process.join(PATIENCE_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
            raise TimeoutError("the conformance target did not end")
        self._lines.close()
        self._socket.close()


def _run(spec: TransportSpec, seed: int, link: socket.socket, environment: dict[str, str]) -> None:
    """In the child: the link stands for standard input and output."""
    os.environ.clear()
    os.environ.update(environment)
    with link:
        os.dup2(link.fileno(), 0)
        os.dup2(link.fileno(), 1)
    sys.stdin = os.fdopen(0)
    serve(spec, seed)
