"""The far end of the conformance kit: memory with a known pattern behind a transport, in this process or another."""

import functools
import importlib
import mmap
import os
import select
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import numpy as np
import numpy.typing as npt

from pdkv.schema import LocalMemory, TransportAddress
from pdkv.transport.base import Transport

Bytes = npt.NDArray[np.uint8]

MEMORY_SIZES = (24 << 20, 1_000_003)
"""Bytes of each target's memories: room for spans of tens of MB, and one of odd length."""

PATIENCE_S = 60.0
"""How long a check waits for what must come. No check measures time: this only ends a hang."""


class TransportSpec(msgspec.Struct, frozen=True):
    """How to make the transport under test, here and in another process."""

    factory: str
    """ "module:callable"; the callable takes ``argument`` and returns a new ``Transport``."""
    argument: str = ""
    separate_process: bool = True
    """Whether the two ends live in different processes; False only for a transport that cannot leave its own."""
    prefix: tuple[str, ...] = ()
    """Goes before the command of the other process, as in ``ip netns exec NAME``; it must become that command."""
    path: str | None = None
    """What ``Transport.path`` must say after a read; None = anything but "unknown"."""
    memory: str = ""
    """ "module:callable" that takes a number of bytes and returns a ``KitMemory``; empty = ``SharedArray``."""

    def make(self) -> Transport:
        make: Callable[[str], Transport] = _named(self.factory)
        return make(self.argument)

    def allocate(self, size: int) -> "KitMemory":
        make: Callable[[int], KitMemory] = _named(self.memory) if self.memory else SharedArray
        return make(size)


def _named(what: str) -> Any:
    module, _, name = what.partition(":")
    return getattr(importlib.import_module(module), name)


class KitMemory(Protocol):
    """Memory that checks fill, register and look at, wherever it lies. Freed when nobody refers to it."""

    memory: LocalMemory

    @property
    def bytes(self) -> Bytes:
        """What it holds: a view, or a copy where processors cannot look."""

    def look(self, start: int, length: int) -> Bytes:
        """Part of ``bytes``; where that is a copy, a copy of no more than the part."""

    def fill(self, values: Bytes | int) -> None:
        """Overwrite all of it, and return when that is done."""


class SharedArray:
    """Bytes in a memfd mapped shared, as a worker's arena is on the CPU; unmapped when nobody refers to them."""

    def __init__(self, size: int) -> None:
        descriptor = os.memfd_create("pdkv-conformance", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, size)
        mapping = mmap.mmap(descriptor, size)
        weakref.finalize(mapping, os.close, descriptor)
        self.bytes: Bytes = np.frombuffer(mapping, dtype=np.uint8)  # holds the mapping
        self.memory = LocalMemory(address=self.bytes.ctypes.data, length=size, memfd=descriptor)

    def look(self, start: int, length: int) -> Bytes:
        return self.bytes[start : start + length]

    def fill(self, values: Bytes | int) -> None:
        self.bytes[:] = values


@functools.lru_cache(maxsize=2 * len(MEMORY_SIZES))
def pattern(seed: int, memory: int) -> Bytes:
    """What a target of that seed holds in that memory, read-only: no byte is 0xEE, the poison of destinations."""
    size = MEMORY_SIZES[memory]
    words = np.arange((size + 7) // 8, dtype=np.uint64)
    words = (words + np.uint64(seed * 1000 + memory)) * np.uint64(0x9E3779B97F4A7C15)
    filled = (words ^ (words >> np.uint64(29))).view(np.uint8)[:size]
    filled[filled == 0xEE] = 0x11
    filled.flags.writeable = False
    return filled


class Target(Protocol):
    """A far end as checks see it."""

    seed: int
    address: TransportAddress

    def kill(self) -> None:
        """End it without warning; returns once it is gone."""

    def close(self) -> None:
        """End it in good order."""


class RemoteTarget(Target, Protocol):
    """One in a process of its own, which does as the lines that it is sent say."""

    def send(self, line: str) -> None: ...

    def answer(self) -> bytes:
        """The target's next line; an error if it does not come."""

    def has_answered(self) -> bool: ...

    def stop(self) -> None:
        """Let the process run no more, until ``resume``."""

    def resume(self) -> None: ...


class LocalTarget:
    """A target in this process; its death is ``Transport.close``."""

    def __init__(self, spec: TransportSpec, seed: int) -> None:
        self.seed = seed
        self._transport = spec.make()
        self._arrays = [spec.allocate(size) for size in MEMORY_SIZES]
        for index, array in enumerate(self._arrays):
            array.fill(pattern(seed, index))
            self._transport.register(array.memory)
        self.address = self._transport.address()

    def kill(self) -> None:
        self.close()

    def close(self) -> None:
        self._transport.close()
        self._arrays.clear()


class SpawnedTarget:
    """A target in a process of its own, which ends when this one does."""

    def __init__(self, spec: TransportSpec, seed: int) -> None:
        self.seed = seed
        command = [
            *spec.prefix,
            sys.executable,
            "-m",
            "pdkv.transport.conformance_target",
            msgspec.json.encode(spec).decode(),
            str(seed),
        ]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place or os.curdir for place in sys.path)}
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        self.address = msgspec.json.decode(self.answer(), type=TransportAddress)

    def send(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()

    def has_answered(self) -> bool:
        return self._has_line(0)

    def answer(self) -> bytes:
        """The target's next line; an error if it does not come."""
        assert self._process.stdout is not None
        if not self._has_line(PATIENCE_S):
            raise TimeoutError("the conformance target does not answer")
        line = self._process.stdout.readline()
        if not line:
            raise ChildProcessError("the conformance target ended; its standard error says why")
        return line

    def _has_line(self, timeout_s: float) -> bool:
        assert self._process.stdout is not None
        return bool(select.select([self._process.stdout.fileno()], [], [], timeout_s)[0])

    def stop(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._reap()

    def close(self) -> None:
        if self._process.returncode is not None:
            return
        if self._process.poll() is None:
            self.resume()
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._reap()
        if self._process.returncode != 0:
            raise ChildProcessError(f"the conformance target ended by itself with status {self._process.returncode}")

    def _reap(self) -> None:
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def serve(spec: TransportSpec, seed: int) -> None:
    """Be the target's process: hold the memory until standard input ends. "hold-gil" keeps the interpreter busy for a
    while, then answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # libraries may print what they like
    target = LocalTarget(spec, seed)
    answers.write(msgspec.json.encode(target.address) + b"\n")
    answers.flush()
    for line in sys.stdin:
        if line.strip() == "hold-gil":
            answers.write(b"holding\n")
            answers.flush()
            sum(range(40_000_000))  # one C loop: the interpreter lets nothing else run until it ends
            answers.write(b"released\n")
            answers.flush()
    target.close()


if __name__ == "__main__":
    serve(msgspec.json.decode(sys.argv[1], type=TransportSpec), int(sys.argv[2]))
