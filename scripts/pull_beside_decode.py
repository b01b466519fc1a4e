"""What decode loses while a prompt's state is pulled into the same GPU: histograms of step times.

    python scripts/pull_beside_decode.py --batch 32 --context 32768 --svg steps.svg

Decode steps of M3's real dimensions (fewer layers, random weights, CUDA graphs) run on the first GPU, while a thread of
the same process pulls from another process's memory on the last GPU over nvlink: arena rows, fragments of per-layer
tensors, or rows at a bounded rate. Modes take turns, and every mode's steps are of the same batch.
"""

import argparse
import json
import multiprocessing
import select
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from bench_decode_step import random_arena, random_run

from pdkv.bench.geometry import Spans, Workload, memory_bytes
from pdkv.bench.memories import GpuPlace, allocate
from pdkv.m3.decode_graphs import DecodeShapes
from pdkv.m3.model import load_model
from pdkv.m3.requests import EngineSettings
from pdkv.m3.run import Run
from pdkv.m3.step import StepRunner
from pdkv.schema import LocalMemory, ReadBatch, TransportAddress
from pdkv.transport.base import PeerId, ReadStatus
from pdkv.transport.nvlink import NvlinkTransport
from pdkv.verify.m3_shapes import write_config

_IN_FLIGHT = 2
"""Batches of reads, so that the link never waits for the thread."""
_BATCH_BYTES = 256 << 20


class Mode(NamedTuple):
    name: str
    layout: str = ""
    """Of what is pulled meanwhile; empty = nothing."""
    most_gbps: float = 0.0
    """0 = as fast as it goes."""


class Steps(NamedTuple):
    mode: Mode
    milliseconds: list[float]
    gbps: list[float]
    """Of the pull, by round."""


class Puller:
    """This GPU's end of the link. Owned by the main thread, lent to one pulling thread at a time."""

    def __init__(self, gpu: int, blocks: int, workload: Workload, far: TransportAddress) -> None:
        memory = allocate(GpuPlace(gpu, memory_bytes(workload)))
        self._base = memory.address
        self._transport = NvlinkTransport(blocks)
        self._transport.register(LocalMemory(memory.address, memory.num_bytes, memory.device))
        self._peer: PeerId = self._transport.connect(far)
        self._batches = {layout: list(self._split(Spans.of(workload, layout))) for layout in ("arena", "per-layer")}

    def _split(self, spans: Spans) -> Iterator[ReadBatch]:
        count = max(1, -(-spans.num_bytes // _BATCH_BYTES))
        for part in np.array_split(np.arange(spans.length.size), count):
            length = spans.length[part]
            yield ReadBatch(np.zeros_like(length), spans.remote[part], spans.local[part] + self._base, length)

    @contextmanager
    def pulling(self, mode: Mode, rates: list[float]) -> Iterator[None]:
        """While the context is open. Its rate is appended to ``rates``. Raises what the thread raised."""
        if not mode.layout:
            yield
            return
        ending, errors = threading.Event(), list[Exception]()

        def work() -> None:
            try:
                rates.append(self._pull(self._batches[mode.layout], mode.most_gbps, ending))
            except Exception as error:  # noqa: BLE001  it is raised again below
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        try:
            yield
        finally:
            ending.set()
            thread.join()
        if errors:
            raise errors[0]

    def _pull(self, batches: Sequence[ReadBatch], most_gbps: float, ending: threading.Event) -> float:
        """Over and over until the end; returns GB/s."""
        began, posted, moved, turn, outstanding = time.perf_counter(), 0, 0, 0, list[int]()
        while outstanding or not ending.is_set():
            due = began + (posted / most_gbps / 1e9 if most_gbps else 0.0)
            while not ending.is_set() and len(outstanding) < _IN_FLIGHT and time.perf_counter() >= due:
                batch = batches[turn % len(batches)]
                self._transport.submit(self._peer, batch)
                outstanding.append(int(batch.length.sum()))
                posted += outstanding[-1]
                turn += 1
                due = began + (posted / most_gbps / 1e9 if most_gbps else 0.0)
            left = due - time.perf_counter() if most_gbps and len(outstanding) < _IN_FLIGHT else 1.0
            select.select([self._transport.fileno()], [], [], max(0.0, left))
            for done in self._transport.poll():
                if done.status is not ReadStatus.OK:
                    raise RuntimeError(f"the pull failed: {done.error}")
                moved += outstanding.pop(0)
        return moved / (time.perf_counter() - began) / 1e9

    def close(self) -> None:
        self._transport.close()


def main() -> int:
    options = _parse()
    count = torch.cuda.device_count()
    if not count:
        print("pull_beside_decode: no CUDA device")
        return 2
    workload = Workload(options.rows * 128, 4)
    with _far_end(count - 1, workload) as far:
        puller = Puller(0, options.blocks, workload, far)
        results = _measure(options, puller)
        puller.close()
    print(
        f"{torch.cuda.get_device_name()}, {count} GPUs, torch {torch.__version__}; batch {options.batch}, context "
        f"{options.context:,}, {options.layers} layers ({options.dense} dense) of M3's dimensions, ms a step"
    )
    print(f"{'beside':<28} {'GB/s':>6} {'steps':>6} {'p50':>8} {'p90':>8} {'p99':>8} {'max':>8} {'p50 x':>6}")
    alone = statistics.median(results[0].milliseconds)
    for result in results:
        print(_row(result, alone))
    if options.json is not None:
        options.json.write_text(json.dumps([result._asdict() for result in results]))
    if options.svg is not None:
        options.svg.write_text(histogram(results))
    return 0


def _measure(options: argparse.Namespace, puller: Puller) -> list[Steps]:
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options.layers, options.dense)
        model = load_model(Path(folder), device="cuda:0", load_format="dummy")
    blocks = -(-(options.context + 1) // 128)
    arena = random_arena(model, options, options.batch * blocks)
    settings = EngineSettings(max_model_len=blocks * 128, max_batch=options.batch)
    shapes = DecodeShapes((options.batch,), (1,), DecodeShapes.of(settings, 128, arena.num_pages).max_blocks)
    runner = StepRunner(model, arena, shapes)
    runner.prepare()
    runs = [random_run(number, blocks, options.context, 1) for number in range(options.batch)]
    modes = [Mode("nothing"), Mode("rows", "arena"), Mode("fragments", "per-layer")]
    modes += [Mode(f"rows, at most {limit:g} GB/s", "arena", limit) for limit in options.limits]
    results = [Steps(mode, [], []) for mode in modes]
    for turn in range(-1, options.rounds):
        for result in results:
            with puller.pulling(result.mode, result.gbps if turn >= 0 else []):
                times = [_timed(runner, runs) for _ in range(options.steps)]
            if turn >= 0:
                result.milliseconds.extend(times)
    return results


def _timed(runner: StepRunner, runs: Sequence[Run]) -> float:
    began = time.perf_counter()
    runner.run(runs)
    return 1e3 * (time.perf_counter() - began)


@contextmanager
def _far_end(gpu: int, workload: Workload) -> Iterator[TransportAddress]:
    """Another process with as much memory on GPU ``gpu``, until the context is left."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_offer, args=(theirs, gpu, memory_bytes(workload)))
    process.start()
    theirs.close()
    try:
        yield msgspec.json.decode(ours.recv_bytes(), type=TransportAddress)
    finally:
        ours.close()
        process.join()


def _offer(link: Connection, gpu: int, num_bytes: int) -> None:
    memory = allocate(GpuPlace(gpu, num_bytes))
    transport = NvlinkTransport()
    transport.register(LocalMemory(memory.address, memory.num_bytes, memory.device))
    link.send_bytes(msgspec.json.encode(transport.address()))
    link.poll(None)  # until the other end is closed
    transport.close()


def _row(result: Steps, alone: float) -> str:
    times = sorted(result.milliseconds)
    p50, p90, p99 = (times[min(len(times) - 1, int(len(times) * part))] for part in (0.5, 0.9, 0.99))
    rate = f"{statistics.median(result.gbps):6.1f}" if result.gbps else " " * 6
    told = f"{p50:8.3f} {p90:8.3f} {p99:8.3f} {times[-1]:8.3f} {p50 / alone:6.3f}"
    return f"{result.mode.name:<28} {rate} {len(times):>6} {told}"


def histogram(results: Sequence[Steps]) -> str:
    """Step times of every mode as bars of one width, one row a mode."""
    width, height, left, num_bins = 760, 70, 190, 60
    everything = sorted(time for result in results for time in result.milliseconds)
    low, high = everything[0], everything[int(0.995 * (len(everything) - 1))]
    edges = np.linspace(low, max(high, low * 1.001), num_bins + 1)
    bar = (width - left - 20) / num_bins
    parts = []
    for row, result in enumerate(results):
        counts, _ = np.histogram(np.minimum(result.milliseconds, edges[-1]), edges)
        foot = (row + 1) * (height + 14) + 10
        parts.append(f'<text x="10" y="{foot - 20}">{result.mode.name}</text>')
        for number, count in enumerate(counts):
            tall = height * count / counts.max()
            x = left + number * bar
            parts.append(f'<rect x="{x:.1f}" y="{foot - tall:.1f}" width="{bar:.1f}" height="{tall:.1f}"/>')
        parts.append(f'<path d="M{left} {foot}H{width - 20}" stroke="black"/>')
    foot = len(results) * (height + 14) + 30
    parts += [
        f'<text x="{left + part * (width - left - 20):.0f}" y="{foot}" text-anchor="middle">'
        f"{low + part * (edges[-1] - low):.2f}</text>"
        for part in (0.0, 0.25, 0.5, 0.75, 1.0)
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{foot + 30}" font-family="sans-serif" '
        f'font-size="12" fill="#1f6f8b"><rect width="100%" height="100%" fill="white"/>{"".join(parts)}'
        f'<text x="{left}" y="{foot + 18}">ms a decode step; the last bar holds all longer ones</text></svg>\n'
    )


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1, help="dense layers among them")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--kv-dtype", default="fp8")
    parser.add_argument("--index-dtype", default="fp8")
    parser.add_argument("--rows", type=int, default=512, help="arena rows of 2.96 MB that are pulled, again and again")
    parser.add_argument("--blocks", type=int, default=64, help="thread blocks of the kernel that gathers fragments")
    parser.add_argument("--limits", type=float, nargs="*", default=[200.0, 100.0, 50.0], help="GB/s")
    parser.add_argument("--steps", type=int, default=40, help="decode steps of a mode in a round")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json", type=Path, help="write all step times")
    parser.add_argument("--svg", type=Path, help="write the histograms")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
