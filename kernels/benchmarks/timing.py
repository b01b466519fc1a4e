"""Times by replaying CUDA graphs, and the ceilings that they are compared with, measured in the same run."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

Call = Callable[[], object]

CACHE_BYTES = 256 << 20
"""Calls that follow one another touch at least this much memory in turn: several times what any GPU caches."""
REPLAY_S = 0.06
"""Time spent in replays of one graph that count, unless less is asked for."""
_GRAPH_S = 4e-3
"""A graph holds calls enough to last so long, but never more than ``_MOST_CALLS``."""
_MOST_CALLS = 24
_MOST_TURNS = 60
_HOST_CALLS = 50


@dataclass(frozen=True)
class Rates:
    """Ceilings of the GPU at hand, each the best of several tries."""

    read: float  # bytes a second, memory only read
    copy: float  # bytes a second, read and written bytes counted
    bf16: float  # floating-point operations a second of a large matrix product in bfloat16
    fp8: float  # the same in e4m3 with one scale for each operand; 0 where torch has none


@dataclass(frozen=True)
class Goal:
    """What is asked for: so many times the rival's speed, or this share of the ceiling, whichever takes longer.

    Where only one of them is given, that one.
    """

    ratio: float | None = None
    share: float | None = None

    def seconds(self, floor: float, rival: float | None) -> float | None:
        """The longest time that reaches it; None where it hangs on a rival that was not timed.

        floor: seconds at the ceiling; rival: the rival's seconds.
        """
        if self.ratio is None:
            return floor / self.share if self.share else None
        if rival is None:
            return None
        return max(rival / self.ratio, floor / self.share) if self.share else rival / self.ratio


@dataclass(frozen=True)
class Work:
    """One shape, ready to run. Calls differ only in the memory that they touch, so that no cache answers for it."""

    shape: str
    calls: Sequence[Call]
    num_bytes: int  # bytes that any implementation must move in one call, each counted once
    num_flops: int = 0
    ceiling: str = "read"  # the field of ``Rates`` that bounds this operation
    rival: Sequence[Call] = field(default=())  # the same by vLLM's kernels
    note: str = ""
    goal: Goal | None = None


@dataclass(frozen=True)
class Result:
    """One line of the report. Times in seconds for one call."""

    operation: str
    shape: str
    time_s: float
    share: float  # of the ceiling
    bytes_per_s: float
    flops_per_s: float
    rival_s: float | None
    ratio: float | None  # rival_s / time_s: above 1 we are faster
    asked_s: float | None  # see ``Goal``
    host_s: float  # for a launch from Python, outside any graph
    note: str


def measure(operation: str, work: Work, rates: Rates, replay_s: float = REPLAY_S) -> Result:
    """Time ours and theirs, each in its own graph, in turns, so that both see the GPU at the same clock."""
    graphs = [_Graph(calls) for calls in (work.calls, work.rival) if calls]
    times = _in_turns(graphs, replay_s)
    seconds, rival = times[0], times[1] if work.rival else None
    amount = work.num_flops if work.ceiling in ("bf16", "fp8") else work.num_bytes
    floor = amount / getattr(rates, work.ceiling)
    return Result(
        operation=operation,
        shape=work.shape,
        time_s=seconds,
        share=floor / seconds,
        bytes_per_s=work.num_bytes / seconds,
        flops_per_s=work.num_flops / seconds,
        rival_s=rival,
        ratio=rival / seconds if rival else None,
        asked_s=work.goal.seconds(floor, rival) if work.goal else None,
        host_s=_host_seconds(work.calls, seconds),
        note=work.note,
    )


def time_calls(calls: Sequence[Call]) -> float:
    """Seconds of one call: the median over replays of a graph that holds all of them, several times over if short."""
    return _in_turns([_Graph(calls)], REPLAY_S)[0]


class _Graph:
    """Calls in a CUDA graph, all of them at least once; it owns the graph."""

    def __init__(self, calls: Sequence[Call]) -> None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())  # which may still be filling the inputs: tables of garbage
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        with torch.cuda.stream(stream):
            for call in calls:
                call()
            marks[0].record()
            calls[0]()
            marks[1].record()
        stream.synchronize()
        one = max(marks[0].elapsed_time(marks[1]) * 1e-3, 1e-6)  # launched by itself: rather too long
        rounds = max(1, min(_MOST_CALLS, int(_GRAPH_S / one)) // len(calls))
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            for _ in range(rounds):
                for call in calls:
                    call()
        self._num_calls = rounds * len(calls)

    def seconds(self, replays: int) -> float:
        """Seconds of one call, mean over these replays, behind one more during which the host queues them."""
        marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self._graph.replay()
        marks[0].record()
        for _ in range(replays):
            self._graph.replay()
        marks[1].record()
        marks[1].synchronize()
        return marks[0].elapsed_time(marks[1]) * 1e-3 / (replays * self._num_calls)

    def replay_seconds(self) -> float:
        """Seconds of one replay."""
        return self.seconds(2) * self._num_calls


def _in_turns(graphs: Sequence[_Graph], replay_s: float) -> list[float]:
    """Each graph's median over turns; whoever began a turn ends the next."""
    longest = max(graph.replay_seconds() for graph in graphs)
    turns = max(5, min(_MOST_TURNS, int(replay_s / longest)))
    replays = 2 if longest < 1e-3 else 1
    times: list[list[float]] = [[] for _ in graphs]
    for turn in range(turns):
        order = range(len(graphs)) if turn % 2 == 0 else reversed(range(len(graphs)))
        for nth in order:
            times[nth].append(graphs[nth].seconds(replays))
    return [statistics.median(one) for one in times]


def _host_seconds(calls: Sequence[Call], seconds: float) -> float:
    """What the host takes to launch one call, while the GPU is never so far behind that the host must wait."""
    count = max(2, min(_HOST_CALLS, int(0.2 / seconds)))
    torch.cuda.synchronize()
    start = time.perf_counter()
    for nth in range(count):
        calls[nth % len(calls)]()
    taken = time.perf_counter() - start
    torch.cuda.synchronize()
    return taken / count


def rotations(num_bytes: int, limit: int = 24) -> int:
    """How many copies of a call's inputs make the calls touch ``CACHE_BYTES`` before they meet the first again."""
    return max(2, min(limit, -(-CACHE_BYTES // max(1, num_bytes))))


def measure_rates() -> Rates:
    """Measure the ceilings; takes about a second and 2 GiB."""
    read, copy = _memory_rates()
    size = 8192
    a = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    b = torch.randn(size, size, device="cuda", dtype=torch.bfloat16)
    bf16 = 2 * size**3 / time_calls([lambda: a @ b])
    return Rates(read, copy, bf16, _fp8_rate(a, b))


def _memory_rates() -> tuple[float, float]:
    data = torch.randint(-(1 << 30), 1 << 30, (1 << 29,), dtype=torch.int32, device="cuda")
    read = min(time_calls([_reader(data, *shape)]) for shape in ((1024, 8), (2048, 8), (4096, 8)))
    half = data.numel() // 2
    # Not copy_: a graph gives plain copies to the copy engines, which are slower than a kernel.
    copy = time_calls([lambda: torch.bitwise_not(data[half:], out=data[:half])])
    return data.nbytes / read, data.nbytes / copy


def _fp8_rate(a: torch.Tensor, b: torch.Tensor) -> float:
    if not hasattr(torch, "_scaled_mm") or torch.cuda.get_device_capability() < (8, 9):
        return 0.0
    one = torch.ones((), device="cuda")
    x, y = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()
    product = lambda: torch._scaled_mm(x, y, scale_a=one, scale_b=one, out_dtype=torch.bfloat16)  # noqa: E731
    return float(2 * a.shape[0] ** 3 / time_calls([product]))


def _reader(data: torch.Tensor, tile: int, num_warps: int) -> Call:
    programs = 8 * torch.cuda.get_device_properties(data.device).multi_processor_count
    out = torch.empty(programs, dtype=torch.int32, device=data.device)
    return lambda: _read_kernel[(programs,)](data, out, data.numel(), tile, num_warps=num_warps)


@triton.jit
def _read_kernel(data, out, size, TILE: tl.constexpr):
    """Fold all of data by exclusive or, so that no load can be left out."""
    program = tl.program_id(0)
    step = tl.num_programs(0) * TILE * 4
    lane = tl.arange(0, TILE)
    folded = tl.zeros((TILE,), tl.int32)
    for start in range(program * TILE * 4, size, step):
        at = data + start.to(tl.int64) + lane
        left = size - start - lane
        a = tl.load(at, mask=left > 0, other=0)
        b = tl.load(at + TILE, mask=left > TILE, other=0)
        c = tl.load(at + 2 * TILE, mask=left > 2 * TILE, other=0)
        d = tl.load(at + 3 * TILE, mask=left > 3 * TILE, other=0)
        folded ^= (a ^ b) ^ (c ^ d)
    tl.store(out + program, tl.xor_sum(folded, axis=0))
