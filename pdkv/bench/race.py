"""The run: every contestant in turn, again and again, over the same bytes, all of them checked after every move."""

import contextlib
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from pdkv.bench.geometry import LAYOUTS, Spans, Workload, memory_bytes
from pdkv.bench.lane import Cost, Fds, Lane, LaneError
from pdkv.bench.mover import Memory, SpanTable, map_memory
from pdkv.bench.tools import RIVALS, NotInstalledError, launch_of, operations_of
from pdkv.errors import ConfigError

POISON = 0xEE

CEILING = "ceiling"


class _Load(msgspec.Struct, frozen=True):
    """Spans and the file that contestants load them from. The ceiling always copies whole rows, whatever the layout."""

    layout: str
    spans: Spans
    file: Path
    rows: Spans
    rows_file: Path

    def of(self, contestant: str) -> tuple[Spans, Path]:
        return (self.rows, self.rows_file) if contestant == CEILING else (self.spans, self.file)


class Spread(msgspec.Struct, frozen=True):
    median: float
    min: float
    max: float

    @classmethod
    def of(cls, values: Sequence[float], digits: int = 2) -> "Spread":
        return cls(*(round(f(values), digits) for f in (statistics.median, min, max)))


class Result(msgspec.Struct, frozen=True):
    """A contestant on one path and layout."""

    contestant: str
    path: str
    layout: str
    correct: bool
    """Every byte of every move was right."""
    gbps: Spread
    """Gigabytes (1e9) a second, handing over included; zeros when not correct."""
    spans: int
    post_ms: float
    wire_ms: float
    cpu_s: float
    """Of both sides, one move; medians, all three."""
    operation: str = "read"
    """"write" where a contestant pushes faster than it pulls."""
    error: str = ""


class Plan(msgspec.Struct, frozen=True):
    """What is raced."""

    workload: Workload
    paths: tuple[str, ...] = ("shm", "tcp")
    layouts: tuple[str, ...] = LAYOUTS
    rivals: tuple[str, ...] = ()
    repeats: int = 5
    tools: Path = Path(".venv-bench")
    source_prefix: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    """Address of the source, as the reader reaches it."""


class Report(msgspec.Struct, frozen=True):
    """The whole run."""

    schema: str
    workload: Workload
    num_bytes: int
    cores: int
    load: tuple[float, float]
    """The machine's load average of one minute, before and after: what shared it."""
    results: tuple[Result, ...]
    left_out: tuple[str, ...]
    """Contestants that have no such path, with the reason."""


Tell = Callable[[str], None]


class _Ground:
    """The two memories. Owned by the race; contestants map them too."""

    def __init__(self, num_bytes: int) -> None:
        self.fds = Fds(_memfd("source", num_bytes), _memfd("reader", num_bytes), num_bytes)
        self.source = map_memory(self.fds.source, num_bytes)
        self.reader = map_memory(self.fds.reader, num_bytes)
        words = self.source.bytes[: num_bytes // 8 * 8].view(np.uint64)
        step = 1 << 20
        for start in range(0, words.size, step):  # every word another one; in steps, for the sake of memory
            piece = np.arange(start, min(start + step, words.size), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
            words[start : start + step] = piece ^ (piece >> np.uint64(29))

    def poison(self) -> None:
        self.reader.bytes[:] = POISON

    def close(self) -> None:
        os.close(self.fds.source)
        os.close(self.fds.reader)


def num_wrong(source: Memory, reader: Memory, spans: SpanTable) -> int:
    """Spans that did not come over as they were."""
    return sum(
        not np.array_equal(reader.bytes[local : local + length], source.bytes[remote : remote + length])
        for remote, local, length in spans.T.tolist()
    )


def checked(plan: Plan) -> Plan:
    """The plan, or ``ConfigError`` naming what there is not."""
    for what, chosen, known in (
        ("path", plan.paths, ("shm", "tcp")),
        ("layout", plan.layouts, LAYOUTS),
        ("rival", plan.rivals, RIVALS),
    ):
        if unknown := [name for name in chosen if name not in known]:
            raise ConfigError(f"{what} {unknown[0]!r} is not one of {', '.join(known)}")
    if not plan.paths or not plan.layouts:
        raise ConfigError("a race needs at least one path and one layout")
    return plan


def run(plan: Plan, tell: Tell) -> Report:
    """Race. ``tell`` hears of every step. Errors of contestants are in the results; ``ConfigError`` for a bad plan."""
    began = os.getloadavg()[0]
    num_bytes = memory_bytes(plan.workload)
    results: list[Result] = []
    left_out: list[str] = []
    ground = _Ground(num_bytes)
    try:
        with tempfile.TemporaryDirectory(prefix="pdkv-bench-") as folder:
            loads = _write_spans(plan, Path(folder))
            for path in plan.paths:
                results += _race_path(plan, path, ground, loads, left_out, tell)
    finally:
        ground.close()
    load = (round(began, 2), round(os.getloadavg()[0], 2))
    moved = loads[0].spans.num_bytes
    return Report("pdkv.bench.xfer/1", plan.workload, moved, os.cpu_count() or 1, load, tuple(results), tuple(left_out))


def _write_spans(plan: Plan, folder: Path) -> list[_Load]:
    written = {}
    for layout in {"arena", *plan.layouts}:
        spans, file = Spans.of(plan.workload, layout), folder / f"{layout}.npy"
        np.save(file, spans.table())
        written[layout] = (spans, file)
    return [_Load(layout, *written[layout], *written["arena"]) for layout in plan.layouts]


def _race_path(
    plan: Plan,
    path: str,
    ground: _Ground,
    loads: Sequence[_Load],
    left_out: list[str],
    tell: Tell,
) -> list[Result]:
    with contextlib.ExitStack() as stack:
        lanes: list[Lane] = []
        broken: list[tuple[str, str]] = []
        for name in (CEILING, "pdkv", *plan.rivals):
            if not operations_of(name, path):
                left_out.append(f"{name} has no way over {path}")
                continue
            try:
                lanes.append(stack.enter_context(_best_lane(plan, name, path, ground, loads[0], tell)))
            except LaneError as error:
                broken.append((name, str(error)))
        results = []
        for load in loads:
            results += [_failed(name, path, load, why) for name, why in broken]
            results += _race_layout(plan, lanes, load, ground, tell)
    return results


def _best_lane(plan: Plan, name: str, path: str, ground: _Ground, load: _Load, tell: Tell) -> Lane:
    """Of a contestant that can both pull and push, the faster, by one move each."""
    try:
        launch = launch_of(name, path, plan.tools)
    except NotInstalledError as error:
        raise LaneError(str(error)) from error
    launch = msgspec.structs.replace(launch, source_prefix=plan.source_prefix)
    made: list[tuple[float, Lane]] = []
    errors = []
    for operation in operations_of(name, path):
        tell(f"{path}: {name} gets ready ({operation})")
        try:
            lane = Lane(name, "memcpy" if name == CEILING else path, launch, ground.fds, plan.host, operation)
            made.append((_trial(lane, load.of(name)[1]), lane))
        except LaneError as error:
            errors.append(f"{operation}: {error}")
    if not made:
        raise LaneError("; ".join(errors))
    made.sort(key=lambda pair: pair[0])
    for _, slower in made[1:]:
        slower.close()
    return made[0][1]


def _trial(lane: Lane, file: Path) -> float:
    """Seconds of the second move: the first one connects and touches memory."""
    try:
        lane.load(file)
        lane.move()
        cost = lane.move()
    except LaneError:
        lane.close()
        raise
    return cost.post_s + cost.wire_s


def _race_layout(plan: Plan, lanes: Sequence[Lane], load: _Load, ground: _Ground, tell: Tell) -> Iterator[Result]:
    costs: dict[str, list[Cost]] = {lane.contestant: [] for lane in lanes}
    errors: dict[str, str] = {}
    for turn in range(-1, plan.repeats):  # one to warm up, which counts for nothing but errors
        for lane in lanes:
            name = lane.contestant
            if name in errors:
                continue
            tell(f"{lane.path}, {load.layout}: {name}, {'warming up' if turn < 0 else f'turn {turn + 1}'}")
            try:
                cost = _checked_move(lane, load, ground, first=turn < 0)
            except LaneError as error:
                errors[name] = str(error)
            else:
                costs[name] += [cost] if turn >= 0 else []
    for lane in lanes:
        name = lane.contestant
        if name in errors:
            yield _failed(name, lane.path, load, errors[name])
        else:
            yield _result(lane, load, costs[name])


def _checked_move(lane: Lane, load: _Load, ground: _Ground, *, first: bool) -> Cost:
    """Over poison, with every byte compared. Raises ``LaneError``."""
    spans, file = load.of(lane.contestant)
    ground.poison()
    if first:
        lane.load(file)
    cost = lane.move()
    if wrong := num_wrong(ground.source, ground.reader, spans.table()):
        raise LaneError(f"{wrong} of {spans.length.size} spans came over wrong")
    return cost


def _result(lane: Lane, load: _Load, costs: Sequence[Cost]) -> Result:
    spans = load.of(lane.contestant)[0]
    return Result(
        contestant=lane.contestant,
        path=lane.path,
        layout=load.layout,
        correct=True,
        gbps=Spread.of([spans.num_bytes / (cost.post_s + cost.wire_s) / 1e9 for cost in costs]),
        spans=spans.length.size,
        post_ms=round(1e3 * statistics.median(cost.post_s for cost in costs), 2),
        wire_ms=round(1e3 * statistics.median(cost.wire_s for cost in costs), 2),
        cpu_s=round(statistics.median(cost.cpu_s for cost in costs), 3),
        operation=lane.operation,
    )


def _failed(name: str, path: str, load: _Load, why: str) -> Result:
    return Result(name, path, load.layout, False, Spread(0, 0, 0), load.of(name)[0].length.size, 0, 0, 0, error=why)


def _memfd(name: str, num_bytes: int) -> int:
    fd = os.memfd_create(f"pdkv-bench-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    return fd
