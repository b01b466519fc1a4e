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
from pdkv.bench.ground import Ground, HostGround
from pdkv.bench.lane import CEILING, Cost, Lane, LaneError
from pdkv.bench.memories import gpu_names
from pdkv.bench.mover import SOURCE, Role
from pdkv.bench.tools import GPU_PATH, RIVALS, NotInstalledError, launch_of, operations_of
from pdkv.errors import ConfigError

PATHS = ("shm", "tcp", GPU_PATH)


class _Written(msgspec.Struct, frozen=True):
    """Spans, and the file that contestants load them from."""

    spans: Spans
    file: Path


class _Load(msgspec.Struct, frozen=True):
    """What is moved on one path. The ceiling copies whole rows, whatever the layout; on GPUs, all memory at once."""

    layout: str
    spans: _Written
    ceiling: _Written

    def of(self, contestant: str) -> _Written:
        return self.ceiling if contestant == CEILING else self.spans


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
    gpus: tuple[int, ...] = ()
    """Source's and reader's, for cuda_ipc; empty = the first two, or the only one twice."""


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
    gpus: tuple[str, ...] = ()
    """Source's and reader's, where memory of GPUs was raced."""


Tell = Callable[[str], None]


def paths_of(device: str) -> tuple[str, ...]:
    """What is raced on "cpu", on "cuda", or, for "auto", on whichever there is. Raises ``ConfigError``."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device {device!r} is not one of auto, cpu, cuda")
    on_gpus = device == "cuda" or (device == "auto" and bool(gpu_names()))
    return (GPU_PATH,) if on_gpus else ("shm", "tcp")


def checked(plan: Plan) -> Plan:
    """The plan, or ``ConfigError`` naming what there is not."""
    for what, chosen, known in (
        ("path", plan.paths, PATHS),
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
    results: list[Result] = []
    left_out: list[str] = []
    gpus = _gpus(plan)
    with tempfile.TemporaryDirectory(prefix="pdkv-bench-") as folder, contextlib.ExitStack() as stack:
        loads = _write_spans(plan, Path(folder))
        host: Ground | None = None
        for path in plan.paths:
            if path == GPU_PATH:
                ground = _gpu_ground(plan, gpus)
            else:
                ground = host = host or stack.enter_context(contextlib.closing(HostGround(memory_bytes(plan.workload))))
            results += _race_path(plan, path, ground, loads[path], left_out, tell)
    return Report(
        schema="pdkv.bench.xfer/1",
        workload=plan.workload,
        num_bytes=loads[plan.paths[0]][0].spans.spans.num_bytes,
        cores=os.cpu_count() or 1,
        load=(round(began, 2), round(os.getloadavg()[0], 2)),
        results=tuple(results),
        left_out=tuple(left_out),
        gpus=tuple(gpu_names()[gpu] for gpu in gpus),
    )


def _gpus(plan: Plan) -> tuple[int, ...]:
    """Source's and reader's; empty when no GPU takes part. Raises ``ConfigError`` for those that there are not."""
    if GPU_PATH not in plan.paths:
        return ()
    found = len(gpu_names())
    chosen = plan.gpus or ((0, 1) if found > 1 else (0, 0))
    if missing := [gpu for gpu in chosen if not 0 <= gpu < found]:
        raise ConfigError(f"path {GPU_PATH} wants GPU {missing[0]}, and this machine has {found} NVIDIA GPUs")
    return chosen


def _gpu_ground(plan: Plan, gpus: Sequence[int]) -> Ground:
    from pdkv.bench.gpu_ground import GpuGround  # noqa: PLC0415  torch

    return GpuGround(gpus[0], gpus[1], memory_bytes(plan.workload))


def _write_spans(plan: Plan, folder: Path) -> dict[str, list[_Load]]:
    """By path."""
    written = {}
    for name in {"arena", *plan.layouts}:
        written[name] = _write(Spans.of(plan.workload, name), folder / f"{name}.npy")
    whole = np.array([0]), np.array([0]), np.array([memory_bytes(plan.workload)])
    at_once = _write(Spans(*whole), folder / "whole.npy")
    return {
        path: [_Load(name, written[name], at_once if path == GPU_PATH else written["arena"]) for name in plan.layouts]
        for path in plan.paths
    }


def _write(spans: Spans, file: Path) -> _Written:
    np.save(file, spans.table())
    return _Written(spans, file)


def _race_path(
    plan: Plan,
    path: str,
    ground: Ground,
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
            results += _race_layout(plan, lanes, load, tell)
    return results


def _best_lane(plan: Plan, name: str, path: str, ground: Ground, load: _Load, tell: Tell) -> Lane:
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
            role = Role("memcpy" if name == CEILING else path, SOURCE, plan.host, operation)
            lane = Lane(name, role, launch, ground)
            made.append((_trial(lane, load.of(name).file), lane))
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


def _race_layout(plan: Plan, lanes: Sequence[Lane], load: _Load, tell: Tell) -> Iterator[Result]:
    costs: dict[str, list[Cost]] = {lane.contestant: [] for lane in lanes}
    errors: dict[str, str] = {}
    for turn in range(-1, plan.repeats):  # one to warm up, which counts for nothing but errors
        for lane in lanes:
            name = lane.contestant
            if name in errors:
                continue
            tell(f"{lane.path}, {load.layout}: {name}, {'warming up' if turn < 0 else f'turn {turn + 1}'}")
            try:
                cost = _move(lane, load.of(name), first=turn < 0)
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


def _move(lane: Lane, written: _Written, *, first: bool) -> Cost:
    if first:
        lane.load(written.file)
    return lane.checked_move(written.spans.table())


def _result(lane: Lane, load: _Load, costs: Sequence[Cost]) -> Result:
    spans = load.of(lane.contestant).spans
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
    return Result(name, path, load.layout, False, Spread(0, 0, 0), load.of(name).spans.length.size, 0, 0, 0, error=why)
