"""Time decode steps of M3's real dimensions on one GPU: CUDA graphs against single launches, and the host's share.

    python scripts/bench_decode_step.py --layers 4 --dense 1 --context 32768

Random weights; the state in the pages is random too. *step* is a whole step as the engine sees it, from numbers in to
tokens out; *GPU* is the graph alone, between events; *host* is what is left of a step whose GPU work is taken away:
filling buffers, launching, reading the answer.

The second table is of a whole decode worker's engine thread: scheduler, buffers, bookkeeping, and the message to the
front; waiting for each step, and overlapped. Its *host* is a step's time by the clock less what of it was spent waiting
for the GPU (by the engine's own wait): its mean, and what a tenth of the steps, half of them and nine tenths stayed
below. *CPU* is what of the mean this thread was running; the parts that follow are by the clock, medians, each without
those inside it: *graph* is the call that replays it. All in microseconds. With ``--sampled`` its requests are drawn
for, and *GPU* is with the draws. With

    python scripts/bench_decode_step.py --device cpu --context 1000 --batches 1 8 64 256

the model's part is left out (the same result again and again, of a tiny model), and the table is the host's alone.
"""

import argparse
import functools
import gc
import json
import platform
import queue
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from pdkv_kernels.decode_rows_ref import GROWS

from pdkv.agent.events import StartTransfer, TransferArrived, TransferFacts
from pdkv.agent.loop import now
from pdkv.daemons.decode_role import DecodeRole
from pdkv.daemons.link import BlockingLink, DecodeJob, JobFinished, Sampling, ToFront
from pdkv.daemons.roles import EngineParts
from pdkv.daemons.transfer_journal import TransferJournal
from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeGraphs, DecodeShapes
from pdkv.m3.engine import Engine
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import EngineEvent, EngineSettings, RequestId
from pdkv.m3.run import Run, Step
from pdkv.m3.sampling import SamplingParams
from pdkv.m3.step import StepRunner
from pdkv.memory.arena import Arena
from pdkv.memory.pages import PagePool
from pdkv.memory.row import RowLayout
from pdkv.schema import TransferId
from pdkv.verify.m3_shapes import config, write_config

_T = TypeVar("_T")
_GREEDY = SamplingParams()
_WAYS = {
    "no": (Sampling(), 0),
    "temperature": (Sampling(0.8, 7), 0),
    "top_p": (Sampling(0.8, 7, 0.95), 0),
    "top_logprobs": (Sampling(0.8, 7, 0.95), 5),
}
"""How tokens are chosen, and how many likeliest are told of."""
_NUM_TOKENS = 128
"""Tokens of prompts are less: every model here has so many."""
_WARM = 5
"""Steps of a worker before those that count."""
_SMALL = {
    "dtype": "float32",
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_topk_blocks": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "intermediate_size": 32,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 32,
    "vocab_size": _NUM_TOKENS,
}


def main() -> int:
    options = _parse()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("bench_decode_step: no CUDA device; --device cpu shows the host's part alone")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        if options.device == "cuda":
            write_config(Path(folder), options.layers, options.dense)
        else:
            (Path(folder) / "config.json").write_text(json.dumps(config(options.layers, options.dense) | _SMALL))
        model = load_model(Path(folder), device=f"{options.device}", load_format="dummy")
    of = "M3's dimensions" if options.device == "cuda" else "next to no dimensions, launched one by one"
    print(
        f"{_device_name(options.device)}, torch {torch.__version__}; {options.layers} layers ({options.dense} dense) "
        f"of {of}, context {options.context:,}, K/V {options.kv_dtype}, index keys {options.index_dtype}"
    )
    if options.device == "cuda" and options.query_lens:
        print(f"{'batch':>5} {'rows':>4} {'eager ms':>9} {'step ms':>8} {'GPU ms':>8} {'host us':>8} {'equal':>6}")
        for query_len in options.query_lens:
            for batch in options.batches:
                print(_row(model, options, batch, query_len), flush=True)
    coming = f"one comes and one goes every {options.churn} steps" if options.churn else "nobody comes or goes"
    print(f"a worker's steps, {coming}")
    columns = ("step ms", "GPU ms", "host", "10 %", "50 %", "90 %", "CPU", *_Clock.PARTS)
    print(f"{'batch':>5} {'steps':>10}" + "".join(f" {column:>8}" for column in columns))
    for batch in options.batches:
        for overlap in (False, True):
            print(_worker_row(model, options, batch, overlap=overlap), flush=True)
    return 0


def _device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace")
    names = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    return f"{names[0] if names else platform.machine()} ({len(names)} cores)"


def _row(model: M3Model, options: argparse.Namespace, batch: int, query_len: int) -> str:
    blocks = -(-(options.context + 1) // 128)
    arena = random_arena(model, options, batch * blocks)
    settings = EngineSettings(max_model_len=blocks * 128, max_batch=batch, speculative_tokens=query_len - 1)
    shapes = DecodeShapes((batch,), (query_len,), DecodeShapes.of(settings, 128, arena.num_pages).max_blocks)
    runs = [random_run(number, blocks, options.context, query_len) for number in range(batch)]
    eager = DecodeGraphs(model, arena, shapes, replays=False)
    flight = eager.launch(runs)
    wanted, wanted_hidden = flight.wait().samples(), flight.hidden()
    eager_ms = 1e3 * _median(lambda: eager.launch(runs).wait(), 10)
    graphs = DecodeGraphs(model, arena, shapes)
    flight = graphs.launch(runs)
    equal = flight.wait().samples() == wanted and torch.equal(flight.hidden(), wanted_hidden)
    step_ms = 1e3 * _median(lambda: graphs.launch(runs).wait(), 30)
    gpu_ms = _graph_ms(graphs)
    told = f"{eager_ms:9.2f} {step_ms:8.3f} {gpu_ms:8.3f} {1e3 * (step_ms - gpu_ms):8.0f} {equal!s:>6}"
    return f"{batch:5} {query_len:4} {told}"


def _worker_row(model: M3Model, options: argparse.Namespace, batch: int, *, overlap: bool) -> str:
    """As a decode worker, with its role and its link to a front: every prompt's state is in its pages already."""
    gc.collect()  # what is timed refers to itself, and the last worker's arena is in the way
    worker = _Worker(model, options, batch, overlap=overlap)
    gc.collect()  # all came at once: the collector's first look at their prompts would fall to one step
    steps, hosts = [], []
    for number in range(_WARM + options.steps):
        before, busy, begin = worker.clock.read(), time.thread_time(), time.perf_counter()
        worker.turn()
        wall, cpu = time.perf_counter() - begin, time.thread_time() - busy
        worker.replace_ended()
        if number >= _WARM:
            *parts, device_cpu, waited = [now - was for now, was in zip(worker.clock.read(), before, strict=True)]
            steps.append(wall)
            hosts.append([wall - waited, cpu - device_cpu, *parts])
    worker.close()
    gpu_ms = f"{worker.graph_ms():8.3f}" if options.device == "cuda" else f"{'-':>8}"
    host, cpu, *parts = zip(*hosts, strict=True)
    deciles = statistics.quantiles(host, n=10)
    told = (
        statistics.mean(host),
        deciles[0],
        deciles[4],
        deciles[8],
        statistics.mean(cpu),
        *map(statistics.median, parts),
    )
    numbers = "".join(f" {1e6 * seconds:8.0f}" for seconds in told)
    kind = "overlapped" if overlap else "waiting"
    return f"{batch:5} {kind:>10} {1e3 * statistics.median(steps):8.3f} {gpu_ms}{numbers}"


class _Clock:
    """Seconds in each part of the host's work so far, by the clock. Then those of waits for the device: of this thread,
    and by the clock."""

    PARTS = ("schedule", "launch", "graph", "read", "account", "tell")

    def __init__(self) -> None:
        self._seconds = [0.0] * (len(self.PARTS) + 2)
        self._inside = 0.0
        """Of what is timed now, in others that are."""

    def read(self) -> list[float]:
        return list(self._seconds)

    def timed(self, part: str, work: Callable[..., _T]) -> Callable[..., _T]:
        return self._adding(self.PARTS.index(part), work)

    def of_device(self, work: Callable[..., _T]) -> Callable[..., _T]:
        def of_thread(*args: object) -> _T:
            begin = time.thread_time()
            result = work(*args)
            self._seconds[-2] += time.thread_time() - begin
            return result

        return self._adding(len(self._seconds) - 1, of_thread)

    def _adding(self, index: int, work: Callable[..., _T]) -> Callable[..., _T]:
        def timed(*args: object) -> _T:
            outside, self._inside = self._inside, 0.0
            begin = time.perf_counter()
            result = work(*args)
            took = time.perf_counter() - begin
            self._seconds[index] += took - self._inside
            self._inside = outside + took
            return result

        return timed


class _Watched:
    """An object one of whose methods is timed; nothing but it and ``record`` is asked for."""

    def __init__(self, it: Any, **methods: Callable[..., object]) -> None:  # noqa: ANN401  an event, or a step
        self._it = it
        self.__dict__.update(methods)

    def record(self, stream: torch.cuda.Stream) -> None:
        self._it.record(stream)


class _Worker:
    """A decode worker's engine thread, from its scheduler to its link; what it asks of its agent has just happened."""

    def __init__(self, model: M3Model, options: argparse.Namespace, batch: int, *, overlap: bool) -> None:
        self._options, self._batch = options, batch
        self._most_tokens = _WARM + options.steps + 3 + batch * options.churn
        blocks = -(-(options.context + self._most_tokens) // 128)
        arena = random_arena(model, options, batch * blocks)
        settings = EngineSettings(
            max_model_len=blocks * 128, max_batch=batch, overlap=overlap, prefix_seed=b"as a worker has one"
        )
        shapes = DecodeShapes((batch,), (1,), DecodeShapes.of(settings, 128, arena.num_pages).max_blocks)
        runner = StepRunner(model, arena, shapes, always_shaped=True)
        runner.prepare()
        self._engine = Engine(runner, PagePool(arena.num_pages), settings)
        ours, front = socket.socketpair()
        with front:  # read by somebody on another core
            self._front = subprocess.Popen(["cat"], stdin=front, stdout=subprocess.DEVNULL)
        self._link = BlockingLink(ours)
        self._asked: list[object] = []
        self._ended = 0
        journal = TransferJournal()
        parts = EngineParts(self._engine, self._asked.append, journal.sending(self._send), journal.meter)
        self._role = DecodeRole(parts, 128)
        self._num_jobs = 0
        self._inbox: queue.SimpleQueue[object] = queue.SimpleQueue()
        for number in range(batch):
            self._come(2 + _WARM + number * options.churn if options.churn else self._most_tokens)
        self.clock = _Clock()
        self._watch(runner)
        self._graphs = runner._graphs

    def turn(self) -> None:
        """As ``EngineSide.turn``, when nobody has said anything."""
        assert self._engine.has_work
        assert self._inbox.empty()
        events = self._engine.step()
        self._tell(events)

    def replace_ended(self) -> None:
        """Not in the time of any step: whoever has ended makes room for another."""
        for _ in range(self._ended):
            self._come(self._batch * self._options.churn)
        self._ended = 0

    def graph_ms(self) -> float:
        assert self._graphs is not None
        return _graph_ms(self._graphs, draws=self._options.sampled != "no")

    def close(self) -> None:
        self._link.end()
        self._link.release()
        self._front.wait()

    def _come(self, max_tokens: int) -> None:
        number, self._num_jobs = self._num_jobs, self._num_jobs + 1
        length = self._options.context - number * 37 % 128  # so that not all begin their pages in one step
        prompt = [number // _NUM_TOKENS, number % _NUM_TOKENS, *(i % _NUM_TOKENS for i in range(length - 2))]
        id_ = TransferId(number.to_bytes(16, "big"))
        sampling, num_top = _WAYS[self._options.sampled]
        job = DecodeJob(id_, prompt, max_tokens, sampling, True, "", 0, 1e9, num_top)
        self._role.on_front(job, time.monotonic())
        start = self._asked.pop()
        assert isinstance(start, StartTransfer), "every job has room"
        facts = TransferFacts(len(start.pages), 1, 1, 0, {}, 0, 0.0, 0.0, "", "", resident_at=now())
        self._role.on_agent(TransferArrived(id_, number % 100, 0.0, facts))

    def _send(self, message: ToFront) -> None:
        self._ended += isinstance(message, JobFinished)
        self._link.send(message)

    def _tell(self, events: list[EngineEvent]) -> None:
        self._role.on_time(time.monotonic())
        self._role.on_step(now())
        self._role.on_engine(events)

    def _watch(self, runner: StepRunner) -> None:
        """Take the time of every part where it is called."""
        clock, scheduler, graphs = self.clock, self._engine._scheduler, runner._graphs
        assert graphs is not None, "the runner was told to have shapes"
        for side in graphs._sides:
            if side.ended is not None:
                side.ended = _Watched(side.ended, synchronize=clock.of_device(side.ended.synchronize))  # type: ignore[assignment]
        if graphs._sides[0].ended is None:
            graphs._compute = functools.cache(graphs._compute)  # type: ignore[method-assign]
            graphs._draw = functools.cache(graphs._draw)  # type: ignore[method-assign]
        scheduler.schedule = clock.timed("schedule", scheduler.schedule)  # type: ignore[method-assign]
        scheduler.complete = clock.timed("account", scheduler.complete)  # type: ignore[method-assign]
        graphs._computed = clock.timed("graph", graphs._computed)  # type: ignore[method-assign]
        launch = clock.timed("launch", runner.launch)

        def launched(step: Step) -> _Watched:
            flight = launch(step)
            return _Watched(flight, wait=clock.timed("read", flight.wait))

        runner.launch = launched  # type: ignore[method-assign,assignment]
        self._tell = clock.timed("tell", self._tell)  # type: ignore[method-assign]


def random_arena(model: M3Model, options: argparse.Namespace, num_pages: int) -> Arena:
    """Every byte random but for exponents that would make a number infinite or NaN."""
    arena = Arena.allocate(
        RowLayout.of(kv_layout(model.config, options.kv_dtype, options.index_dtype)), num_pages, model.device
    )
    for region in arena.regions():
        view = arena.view(region.name, region.layer)
        if view.dtype in (torch.bfloat16, torch.float32, torch.float16):
            view.normal_()
        else:
            view.copy_(torch.randn(view.shape, device=view.device, dtype=torch.bfloat16).to(view.dtype))
    return arena


def random_run(number: int, blocks: int, context: int, query_len: int) -> Run:
    tokens = tuple(7 + number + i for i in range(query_len))
    pages = tuple(range(number * blocks, (number + 1) * blocks))
    return Run(
        id=RequestId(number.to_bytes(4, "big")),
        tokens=tokens,
        start=context + 1 - query_len,
        pages=pages,
        sampling=_GREEDY,
        num_drafts=query_len - 1,
    )


def _median(step: Callable[[], object], count: int) -> float:
    times = []
    for _ in range(count + 3):
        begin = time.perf_counter()
        step()
        times.append(time.perf_counter() - begin)
    return statistics.median(times[3:])


def _graph_ms(graphs: DecodeGraphs, *, draws: bool = False) -> float:
    """Of the only shape's graph, and of what it draws, replayed on and on, at the same tokens."""
    graphs._buffers.numbers[:, :, GROWS] = 0
    (found,) = graphs._graphs.values()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            found.step.replay()
            if draws and found.draws is not None:
                found.draws.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 3)
    return statistics.median(times)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: the host's part alone")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1, help="dense layers among them")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--query-lens", type=int, nargs="*", default=[1, 4], help="rows of each; none: workers only")
    parser.add_argument("--steps", type=int, default=60, help="of a worker, that count")
    parser.add_argument("--churn", type=int, default=0, help="steps after which one request goes and another comes")
    parser.add_argument("--sampled", choices=list(_WAYS), default="no", help="what a worker's requests ask for")
    parser.add_argument("--kv-dtype", default="fp8")
    parser.add_argument("--index-dtype", default="fp8")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
