"""What each transport makes of spans of each size, between two processes of this machine.

    python scripts/bench_links.py --ways shm,sockets,ucx-shm,ucx-tcp --sizes 2K,16K,64K,256K,1M,2892K,16M,64M
    python scripts/bench_links.py --ways nixl,nixl-tcp                    # where NIXL is installed
    python scripts/bench_links.py --memory cuda --ways sockets,ucx        # GPU memory: staged, and by UCX
    python scripts/bench_links.py --first                                 # the first reads of a link, one by one

GB/s is the median of ``--repeat`` reads of ``--megabytes`` (at most 16,384 spans) from random places to random places,
every byte verified; *post* is what ``submit`` takes of the caller, *cpu* the seconds of processors that both processes
used for a gigabyte.
"""

import argparse
import multiprocessing
import os
import select
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection

import msgspec
import numpy as np

from pdkv.schema import ReadBatch, TransportAddress
from pdkv.transport.base import Completion, PeerId, ReadStatus, Transport
from pdkv.transport.conformance_memory import CudaArray
from pdkv.transport.conformance_target import Bytes, KitMemory, SharedArray
from pdkv.transport.nixl import NixlOptions, NixlTransport
from pdkv.transport.shm import ShmTransport
from pdkv.transport.sockets import SocketOptions, SocketTransport
from pdkv.transport.ucx import UcxOptions, UcxTransport

_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_MOST_SPANS = 16384
_PATIENCE_S = 120


class Point(msgspec.Struct, frozen=True):
    """One transport at one size of spans."""

    way: str
    path: str
    note: str
    size: int
    spans: int
    gbps: list[float]
    post_ms: float
    cpu_s_per_gb: float
    correct: bool


def make_way(name: str, memory: str, slice_bytes: int, streams: int) -> Transport:
    gpu = memory == "cuda"
    match name:
        case "shm":
            return ShmTransport()
        case "sockets":
            sizes = {"slice_bytes": slice_bytes, "staged_slice_bytes": slice_bytes} if slice_bytes else {}
            return SocketTransport(SocketOptions(streams=streams, **sizes))
        case "ucx":
            return UcxTransport(UcxOptions(cuda=gpu))
        case "ucx-shm":
            return UcxTransport(UcxOptions(tls="posix,self,cuda_copy" if gpu else "posix,self", cuda=gpu))
        case "ucx-tcp":
            return UcxTransport(UcxOptions(tls="tcp,self,cuda_copy" if gpu else "tcp,self", cuda=gpu))
        case "nixl" | "nixl-tcp":
            return NixlTransport(NixlOptions(tls=name.partition("-")[2] or None))
    raise SystemExit(f"--ways: {name!r} is not one of nixl, nixl-tcp, shm, sockets, ucx, ucx-shm, ucx-tcp")


def allocate(memory: str, size: int) -> KitMemory:
    return CudaArray(size) if memory == "cuda" else SharedArray(size)


def source_bytes(size: int) -> Bytes:
    """What the source holds: words of a counter, multiplied."""
    words = np.arange(-(-size // 8), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return words.view(np.uint8)[:size]


def serve(link: Connection, way: str, memory: str, size: int, options: tuple[int, int]) -> None:
    """The side that is read, in a process of its own. Tells its processor seconds when asked, ends when told."""
    transport = make_way(way, memory, *options)
    source = allocate(memory, size)
    source.fill(source_bytes(size))
    transport.register(source.memory)
    link.send_bytes(msgspec.msgpack.encode(transport.address()))
    while link.recv_bytes() == b"cpu":
        link.send_bytes(str(time.process_time()).encode())
    transport.close()


class Pair:
    """A reader in this process and a target in another. A context manager."""

    def __init__(self, way: str, memory: str, size: int, options: tuple[int, int]) -> None:
        self.way = way
        self.size = size
        context = multiprocessing.get_context("spawn")
        self._link, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, way, memory, size, options))
        self._process.start()
        self.reader = make_way(way, memory, *options)
        self.into = allocate(memory, size)
        self.address = msgspec.msgpack.decode(self._link.recv_bytes(), type=TransportAddress)

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *_: object) -> None:
        self.reader.close()
        self._link.send_bytes(b"end")
        self._process.join()

    def cpu_s(self) -> float:
        self._link.send_bytes(b"cpu")
        return time.process_time() + float(self._link.recv_bytes())

    def read(self, peer: PeerId, batch: ReadBatch) -> tuple[float, float]:
        """Seconds until ``submit`` returned, and until the batch was complete."""
        began = time.perf_counter()
        self.reader.submit(peer, batch)
        posted = time.perf_counter()
        done: list[Completion] = []
        while not done:
            if not select.select([self.reader.fileno()], [], [], _PATIENCE_S)[0]:
                raise SystemExit(f"{self.way}: nothing completes")
            done = self.reader.poll()
        if done[0].status is not ReadStatus.OK:
            raise SystemExit(f"{self.way}: {done[0].error}")
        return posted - began, time.perf_counter() - began


def batch_of(pair: Pair, span: int, total: int) -> tuple[ReadBatch, Bytes]:
    """Spans from random places to other random places; and what the destination must hold then."""
    random = np.random.default_rng(span)
    slots = pair.size // span
    count = max(1, min(_MOST_SPANS, total // span, slots))
    source, target = random.permutation(slots)[:count], random.permutation(slots)[:count]
    wanted = np.zeros(pair.size, dtype=np.uint8)
    rows = source_bytes(pair.size)[: slots * span].reshape(slots, span)
    wanted[: slots * span].reshape(slots, span)[target] = rows[source]
    zeros = np.zeros(count, np.int64)
    return ReadBatch(zeros, source * span, pair.into.memory.address + target * span, np.full(count, span)), wanted


def measure(pair: Pair, peer: PeerId, span: int, total: int, repeat: int) -> Point:
    batch, wanted = batch_of(pair, span, total)
    moved = int(batch.length.sum())
    pair.into.fill(0)
    pair.read(peer, batch)
    correct = bool(np.array_equal(pair.into.bytes, wanted))
    before = pair.cpu_s()
    times = [pair.read(peer, batch) for _ in range(repeat)]
    cpu_s = pair.cpu_s() - before
    return Point(
        way=pair.way,
        path=pair.reader.path(peer),
        note=pair.reader.note(peer),
        size=span,
        spans=batch.num_spans,
        gbps=[moved / taken / 1e9 for _, taken in times],
        post_ms=1e3 * statistics.median(posted for posted, _ in times),
        cpu_s_per_gb=cpu_s / (repeat * moved / 1e9),
        correct=correct,
    )


def sizes_of(way: str, chosen: argparse.Namespace) -> Iterator[Point]:
    total = chosen.megabytes << 20
    with Pair(way, chosen.memory, total, (chosen.slice_bytes, chosen.streams)) as pair:
        pair.into.fill(0)
        pair.reader.register(pair.into.memory)
        peer = pair.reader.connect(pair.address)
        for size in chosen.sizes:
            yield measure(pair, peer, size, total, chosen.repeat)


def first_reads(way: str, chosen: argparse.Namespace) -> None:
    """Milliseconds of a link's first reads of one row, then of one row that no process has touched before."""
    row = 3 << 20
    for touched in (True, False):
        with Pair(way, chosen.memory, 64 * row, (chosen.slice_bytes, chosen.streams)) as pair:
            if touched:
                pair.into.fill(0)
            began = time.perf_counter()
            pair.reader.register(pair.into.memory)
            registered_ms = 1e3 * (time.perf_counter() - began)
            peer = pair.reader.connect(pair.address)
            times = []
            for index in range(6):
                place = np.array([0 if index < 3 else index * row])
                ends = np.array([0]), place, pair.into.memory.address + place, np.array([row])
                times.append(1e3 * pair.read(peer, ReadBatch(*ends))[1])
            kind = "touched" if touched else "untouched"
            told = " ".join(f"{ms:8.2f}" for ms in times)
            sys.stdout.write(
                f"{way:<8} {kind:<9} register {registered_ms:8.2f} ms; same row x 3, new rows: {told} ms\n"
            )
            sys.stdout.flush()


def show(point: Point) -> None:
    size = f"{point.size >> 10} KiB"
    spread = f"{min(point.gbps):6.2f} - {max(point.gbps):6.2f}"
    verdict = "" if point.correct else "  WRONG BYTES"
    sys.stdout.write(
        f"{point.way:<8} {point.path:<8} {size:>10} x {point.spans:<6} {statistics.median(point.gbps):8.2f} GB/s"
        f" ({spread}) post {point.post_ms:7.2f} ms  cpu {point.cpu_s_per_gb:5.2f} s/GB  {point.note}{verdict}\n"
    )
    sys.stdout.flush()


def _size(text: str) -> int:
    unit = _UNITS.get(text[-1:].upper(), 1)
    return int(text.rstrip("kKmMgG")) * unit


def _sizes(text: str) -> list[int]:
    return [_size(part) for part in text.split(",")]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", default="shm,sockets,ucx-shm,ucx-tcp")
    parser.add_argument("--memory", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", type=_sizes, default=_sizes("2K,16K,64K,256K,1M,2892K,16M,64M"))
    parser.add_argument("--megabytes", type=int, default=256)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--slice-bytes", type=_size, default=0, help="of sockets; 0 = as they choose")
    parser.add_argument("--streams", type=int, default=0, help="of sockets; 0 = as they choose")
    parser.add_argument("--first", action="store_true", help="time the first reads of a link instead")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args(arguments)
    points = []
    for way in chosen.ways.split(","):
        if chosen.first:
            first_reads(way, chosen)
            continue
        for point in sizes_of(way, chosen):
            points.append(point)
            if not chosen.json:
                show(point)
    if chosen.json:
        sys.stdout.write(msgspec.json.encode(points).decode() + "\n")
    return 0 if all(point.correct for point in points) else os.EX_DATAERR


if __name__ == "__main__":
    sys.exit(main())
