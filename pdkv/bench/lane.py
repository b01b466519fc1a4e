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
from pdkv.bench.ground import Ground, Judge
from pdkv.bench.memories import DriverError
from pdkv.bench.mover import READER, Role, SpanTable

CEILING = "ceiling"

_PATIENCE_S = 300.0


class LaneError(Exception):
    """A contestant's process that said why it cannot go on, or ended without a word."""


class Cost(msgspec.Struct, frozen=True):
    """Of one move."""

    post_s: float
    wire_s: float
    cpu_s: float
    """Of both sides together."""


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

    def __init__(self, contestant: str, role: Role, launch: Launch, ground: Ground) -> None:
        """``role``: the source's. Raises ``LaneError`` when it cannot be made ready."""
        self.contestant = contestant
        self.path = role.path
        self.operation = role.operation
        self._processes: list[_Process] = []
        self._judge: Judge | None = None
        try:
            self._judge = self._begin(launch, role, ground)
        except DriverError as error:
            self.close()
            raise LaneError(f"its memory cannot be opened: {error}") from error
        except LaneError:
            self.close()
            raise

    def _begin(self, launch: Launch, far: Role, ground: Ground) -> Judge:
        mover = ground.prefix + self.contestant
        near = msgspec.structs.replace(far, side=READER)
        self._reader = self._start(launch, (), ground.fds())
        if self.contestant == CEILING:
            begun = self._reader.tell(Begin(mover, near, ground.reader, ground.source))
            self._reader.tell(Meet(begun.address))
            return ground.judge(begun.handles[1], begun.handles[0])
        self._source = self._start(launch, launch.source_prefix, ground.fds())
        if launch.source_prefix:
            near = msgspec.structs.replace(near, host="0.0.0.0")  # noqa: S104  its own namespace, for one run
        theirs = self._source.tell(Begin(mover, far, ground.source))
        ours = self._reader.tell(Begin(mover, near, ground.reader))
        self._reader.tell(Meet(theirs.address))
        self._source.tell(Meet(ours.address))
        return ground.judge(theirs.handles[0], ours.handles[0])

    def _start(self, launch: Launch, prefix: Sequence[str], fds: Sequence[int]) -> _Process:
        process = _Process(launch, prefix, fds)
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

    def checked_move(self, spans: SpanTable) -> Cost:
        """Over poison and a way that is awake, with every byte compared. Raises ``LaneError`` when one is wrong."""
        assert self._judge is not None, "a lane that was made ready"
        self._judge.poison()
        self._judge.wake()
        cost = self.move()
        if wrong := self._judge.num_wrong(spans):
            raise LaneError(f"{wrong} of {spans.shape[1]} spans came over wrong")
        return cost

    def _cpu_s(self) -> float:
        return sum(process.tell(AskCpu()).cpu_s for process in self._processes)

    def close(self) -> None:
        if self._judge is not None:
            self._judge.close()
            self._judge = None
        for process in self._processes:
            process.end()
        self._processes.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
