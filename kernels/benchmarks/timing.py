"""Times by replaying CUDA graphs, and the ceilings that they are compared with, measured in the same run."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

Call = Callable[[], object]

CACHE_BYTES = 256 << 20
"""Calls that follow one another touch at least this much memory in turn: several times what any GPU caches."""
_REPLAY_S = 0.12
"""Time spent in replays of one graph."""


@dataclass(frozen=True)
class Rates:
    """Ceilings of the GPU at hand, each the best of several tries."""

    read: float  # bytes a second, memory only read
    copy: float  # bytes a second, read and written bytes counted
    bf16: float  # floating-point operations a second of a large matrix product in bfloat16
    fp8: float  # the same in e4m3 with one scale for each operand; 0 where torch has none


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
    note: str


def measure(operation: str, work: Work, rates: Rates) -> Result:
    """Time ours and theirs, each in its own graph, one right after the other."""
    seconds = time_calls(work.calls)
    rival = time_calls(work.rival) if work.rival else None
    amount = work.num_flops if work.ceiling in ("bf16", "fp8") else work.num_bytes
    return Result(
        operation=operation,
        shape=work.shape,
        time_s=seconds,
        share=amount / seconds / getattr(rates, work.ceiling),
        bytes_per_s=work.num_bytes / seconds,
        flops_per_s=work.num_flops / seconds,
        rival_s=rival,
        ratio=rival / seconds if rival else None,
        note=work.note,
    )


def time_calls(calls: Sequence[Call]) -> float:
    """Seconds of one call: the median over replays of a graph that holds all of them, several times over if short."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())  # which may still be filling the inputs: page tables of garbage
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    stream.synchronize()
    repeats = max(1, 24 // len(calls))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(repeats):
            for call in calls:
                call()
    one = _median_replay(graph, 3)
    median = _median_replay(graph, max(5, min(100, int(_REPLAY_S / one))))
    return median / (repeats * len(calls))


def _median_replay(graph: torch.cuda.CUDAGraph, replays: int) -> float:
    graph.replay()
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
    marks[0].record()
    for mark in marks[1:]:
        graph.replay()
        mark.record()
    marks[-1].synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in zip(marks, marks[1:], strict=False)) * 1e-3


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
