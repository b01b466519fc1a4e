"""A contestant as the bench sees it: its processes, what they are told, and what one move cost both."""

import os
import select
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

import msgspec

import pdkv
from pdkv.bench.contestant import Answer, AskCpu, Begin, Load, Meet, Move, Order
from pdkv.bench.mover import READER, SOURCE, Role

_PATIENCE_S = 300.0


class LaneError(Exception):
    """A contestant's process that said why it cannot go on, or ended without a word."""


class Cost(msgspec.Struct, frozen=True):
    """Of one move."""

    post_s: float
    wire_s: float
    cpu_s: float
    """Of both sides together."""


class Fds(msgspec.Struct, frozen=True):
    """The two memories that all contestants move between."""

    source: int
    reader: int
    num_bytes: int


class Launch(msgspec.Struct, frozen=True):
    """How a contestant's processes are started."""

    python: str = sys.executable
    environment: Mapping[str, str] = msgspec.field(default_factory=dict)
    source_prefix: tuple[str, ...] = ()
    """Goes before the source's command, as ``ip netns exec NAME``."""


class _Process:
    """One side. Owned by its lane."""

    def __init__(self, launch: Launch, prefix: Sequence[str], fds: Sequence[int]) -> None:
        places = [str(Path(pdkv.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        self._popen = subprocess.Popen(
            [*prefix, launch.python, "-m", "pdkv.bench.contestant"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=tuple(fds),
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places)), **launch.environment},
        )

    def tell(self, order: Order) -> Answer:
        assert self._popen.stdin is not None
        assert self._popen.stdout is not None
        try:
            self._popen.stdin.write(msgspec.json.encode(order) + b"\n")
            self._popen.stdin.flush()
        except BrokenPipeError:
            raise LaneError(self._last_words()) from None
        if not select.select([self._popen.stdout.fileno()], [], [], _PATIENCE_S)[0]:
            raise LaneError(f"no answer in {_PATIENCE_S:.0f} s")
        line = self._popen.stdout.readline()
        if not line:
            raise LaneError(self._last_words())
        answer = msgspec.json.decode(line, type=Answer)
        if answer.error:
            raise LaneError(answer.error)
        return answer

    def end(self) -> None:
        try:
            self._popen.communicate(timeout=10)
        except (subprocess.TimeoutExpired, ValueError):
            self._popen.kill()
            self._popen.wait()

    def _last_words(self) -> str:
        try:
            _, said = self._popen.communicate(timeout=10)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            _, said = self._popen.communicate()
        lines = said.decode(errors="replace").strip().splitlines()
        return f"its process ended with status {self._popen.returncode}: {lines[-1] if lines else 'not a word'}"


class Lane:
    """A contestant on one path, ready to move. ``close`` must be called; so it is by a with statement."""

    def __init__(self, contestant: str, path: str, launch: Launch, fds: Fds, host: str, operation: str) -> None:
        """Raises ``LaneError`` when it cannot be made ready."""
        self.contestant = contestant
        self.path = path
        self.operation = operation
        self._processes: list[_Process] = []
        try:
            self._begin(launch, fds, host)
        except LaneError:
            self.close()
            raise

    def _begin(self, launch: Launch, fds: Fds, host: str) -> None:
        self._reader = self._start(launch, (), fds)
        if self.contestant == "ceiling":
            role = Role(self.path, READER)
            begun = self._reader.tell(Begin(self.contestant, role, fds.reader, fds.num_bytes, fds.source))
            self._reader.tell(Meet(begun.address))
            return
        self._source = self._start(launch, launch.source_prefix, fds)
        near, far = (Role(self.path, side, host, self.operation) for side in (READER, SOURCE))
        if launch.source_prefix:
            near = msgspec.structs.replace(near, host="0.0.0.0")  # noqa: S104  its own namespace, for one run
        theirs = self._source.tell(Begin(self.contestant, far, fds.source, fds.num_bytes)).address
        ours = self._reader.tell(Begin(self.contestant, near, fds.reader, fds.num_bytes)).address
        self._reader.tell(Meet(theirs))
        self._source.tell(Meet(ours))

    def _start(self, launch: Launch, prefix: Sequence[str], fds: Fds) -> _Process:
        process = _Process(launch, prefix, (fds.source, fds.reader))
        self._processes.append(process)
        return process

    def load(self, spans_file: Path) -> None:
        for process in self._processes:
            process.tell(Load(str(spans_file)))

    def move(self) -> Cost:
        before = self._cpu_s()
        mover = self._reader if self.operation == "read" else self._source
        answer = mover.tell(Move())
        return Cost(answer.post_s, answer.wire_s, self._cpu_s() - before)

    def _cpu_s(self) -> float:
        return sum(process.tell(AskCpu()).cpu_s for process in self._processes)

    def close(self) -> None:
        for process in self._processes:
            process.end()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
