"""What the nvlink transport's two halves give for spans of each length, beside one large copy: finds where they cross.

    python scripts/bench_nvlink_spans.py --source 0 --reader 1

One process holds memory on GPU ``--source``, this one reads scattered spans of it to GPU ``--reader``, which may be the
same. GB/s are medians of ``--repeats`` reads from ``submit`` to the completion, the host's part included.
"""

import argparse
import multiprocessing
import select
import statistics
import time
from multiprocessing.connection import Connection

import numpy as np

from pdkv.bench.memories import GpuPlace, allocate
from pdkv.schema import LocalMemory, ReadBatch, TransportAddress
from pdkv.transport.base import PeerId, ReadStatus, Transport
from pdkv.transport.nvlink import NvlinkTransport

MIB = 1 << 20
ROW = 2_961_408
"""One row of the released model at TP4, fp8."""
LENGTHS = [512, 2 << 10, 8 << 10, *(1024 << n for n in range(4, 13)), ROW]
ALL, NONE = 1, 1 << 62
"""From how many bytes on spans go to the copy engines."""


def main() -> None:
    options = _parse()
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    child = spawn.Process(target=hold, args=(options.source, options.gib << 30, theirs), daemon=True)
    child.start()
    memory = take(options.reader, options.gib << 30)
    address: TransportAddress = ours.recv()
    contestants = {"copies": NvlinkTransport(row_bytes=ALL)}
    for blocks in options.blocks:
        contestants[f"{blocks} blocks"] = NvlinkTransport(blocks, row_bytes=NONE)
    contestants["as shipped"] = NvlinkTransport()
    ready = {}
    for name, transport in contestants.items():
        transport.register(memory)
        ready[name] = (transport, transport.connect(address))
    ceiling = rate(*ready["copies"], scattered(memory, options.gib << 30, 1), options.repeats)
    print(f"one copy of {options.gib} GiB: {ceiling:.0f} GB/s", flush=True)
    print("span bytes | spans | " + " | ".join(f"{name} (post ms)" for name in ready), flush=True)
    for length in LENGTHS:
        count = min((options.gib << 30) // length, options.spans)
        batch = scattered(memory, length, count)
        cells = []
        for way in ready.values():
            gbps = rate(*way, batch, options.repeats)
            cells.append(f"{gbps:.0f} = {gbps / ceiling:.2f} ({post_ms(*way, batch):.2f})")
        print(f"{length:,} | {count:,} | " + " | ".join(cells), flush=True)
    for transport, _ in ready.values():
        transport.close()
    ours.send(None)
    child.join()


def take(gpu: int, size: int) -> LocalMemory:
    held = allocate(GpuPlace(gpu, size))
    return LocalMemory(held.address, held.num_bytes, held.device)


def hold(gpu: int, size: int, pipe: Connection) -> None:
    transport = NvlinkTransport()
    transport.register(take(gpu, size))
    pipe.send(transport.address())
    pipe.recv()
    transport.close()


def scattered(memory: LocalMemory, length: int, count: int) -> ReadBatch:
    """Spans of one length from anywhere in a peer's memory of the same size, one behind the other."""
    slots = np.random.default_rng(1).permutation(memory.length // length)[:count]
    return ReadBatch(
        memory=np.zeros(count, np.int64),
        remote=slots.astype(np.int64) * length,
        local=memory.address + np.arange(count, dtype=np.int64) * length,
        length=np.full(count, length, np.int64),
    )


def rate(transport: Transport, peer: PeerId, batch: ReadBatch, repeats: int) -> float:
    """GB/s, median."""
    times = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        transport.submit(peer, batch)
        _end(transport)
        times.append(time.perf_counter() - started)
    return float(batch.length.sum()) / statistics.median(times[1:]) / 1e9


def post_ms(transport: Transport, peer: PeerId, batch: ReadBatch) -> float:
    """The owner thread's part."""
    started = time.perf_counter()
    transport.submit(peer, batch)
    posted = time.perf_counter() - started
    _end(transport)
    return posted * 1e3


def _end(transport: Transport) -> None:
    while True:
        select.select([transport.fileno()], [], [])
        for completion in transport.poll():
            if completion.status is not ReadStatus.OK:
                raise SystemExit(completion.error)
            return


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=int, default=0, help="GPU that is read")
    parser.add_argument("--reader", type=int, default=0, help="GPU that reads")
    parser.add_argument("--gib", type=int, default=4, help="size of each memory")
    parser.add_argument("--spans", type=int, default=16384, help="most spans of a read")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--blocks", type=int, nargs="*", default=[8, 16, 32, 64, 132])
    return parser.parse_args()


if __name__ == "__main__":
    main()
