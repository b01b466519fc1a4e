"""Time decode steps of M3's real dimensions on one GPU: CUDA graphs against single launches, and the host's share.

    python scripts/bench_decode_step.py --layers 4 --dense 1 --context 32768

Random weights; the state in the pages is random too. *step* is a whole step as the engine sees it, from numbers in to
tokens out; *GPU* is the graph alone, between events; *host* is what is left of a step whose GPU work is taken away:
filling buffers, launching, reading the answer. *engine* adds scheduling and bookkeeping.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from pdkv.m3.config import kv_layout
from pdkv.m3.decode_graphs import DecodeGraphs, DecodeShapes
from pdkv.m3.model import M3Model, load_model
from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestId
from pdkv.m3.run import Run
from pdkv.m3.sampling import SamplingParams
from pdkv.memory.arena import Arena
from pdkv.memory.row import RowLayout
from pdkv.verify.m3_shapes import write_config
from pdkv.verify.undivided import local_worker

_GREEDY = SamplingParams()


def main() -> int:
    options = _parse()
    if not torch.cuda.is_available():
        print("bench_decode_step: no CUDA device")
        return 2
    with tempfile.TemporaryDirectory() as folder:
        write_config(Path(folder), options.layers, options.dense)
        model = load_model(Path(folder), device="cuda:0", load_format="dummy")
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {options.layers} layers ({options.dense} dense) "
        f"of M3's dimensions, context {options.context:,}, K/V {options.kv_dtype}, index keys {options.index_dtype}"
    )
    print(f"{'batch':>5} {'rows':>4} {'eager ms':>9} {'step ms':>8} {'GPU ms':>8} {'host us':>8} {'equal':>6}")
    for query_len in options.query_lens:
        for batch in options.batches:
            print(_row(model, options, batch, query_len), flush=True)
    print(f"{'batch':>5} {'engine step ms':>15} {'engine host us':>15}")
    for batch in options.batches:
        print(_engine_row(model, options, batch), flush=True)
    return 0


def _row(model: M3Model, options: argparse.Namespace, batch: int, query_len: int) -> str:
    blocks = -(-(options.context + 1) // 128)
    arena = random_arena(model, options, batch * blocks)
    settings = EngineSettings(max_model_len=blocks * 128, max_batch=batch, speculative_tokens=query_len - 1)
    shapes = DecodeShapes((batch,), (query_len,), DecodeShapes.of(settings, 128, arena.num_pages).max_blocks)
    runs = [random_run(number, blocks, options.context, query_len) for number in range(batch)]
    eager = DecodeGraphs(model, arena, shapes, replays=False)
    wanted = eager.run(runs)
    eager_ms = 1e3 * _median(lambda: eager.run(runs), 10)
    graphs = DecodeGraphs(model, arena, shapes)
    found = graphs.run(runs)
    equal = found.chosen == wanted.chosen and torch.equal(found.hidden, wanted.hidden)
    step_ms = 1e3 * _median(lambda: graphs.run(runs), 30)
    gpu_ms = _graph_ms(graphs)
    told = f"{eager_ms:9.2f} {step_ms:8.3f} {gpu_ms:8.3f} {1e3 * (step_ms - gpu_ms):8.0f} {equal!s:>6}"
    return f"{batch:5} {query_len:4} {told}"


def _engine_row(model: M3Model, options: argparse.Namespace, batch: int) -> str:
    """Through scheduler and bookkeeping: prompts of one block, so the GPU's part is what the weights take."""
    num_tokens = 40
    settings = EngineSettings(max_model_len=options.context, max_batch=batch, prefill_chunk=8192)
    worker = local_worker(model, batch * 3, settings, options.kv_dtype, options.index_dtype)
    for number in range(batch):
        prompt = tuple((number * 31 + i) % 200_000 for i in range(100))
        request = CompleteRequest(
            id=RequestId(number.to_bytes(4, "big")), prompt=prompt, max_tokens=num_tokens, sampling=_GREEDY
        )
        worker.engine.submit(request)
    for _ in range(6):  # prefill, capture
        worker.engine.step()
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        worker.engine.step()
        times.append(time.perf_counter() - begin)
    step_ms = 1e3 * statistics.median(times)
    gpu_ms = _graph_ms(worker.engine._runner._graphs)  # type: ignore[attr-defined]
    return f"{batch:5} {step_ms:15.3f} {1e3 * (step_ms - gpu_ms):15.0f}"


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


def _graph_ms(graphs: DecodeGraphs) -> float:
    """Of the only graph, replayed on and on."""
    ((graph, _),) = graphs._graphs.values()
    times = []
    for _ in range(12):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 3)
    return statistics.median(times)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dense", type=int, default=1, help="dense layers among them")
    parser.add_argument("--context", type=int, default=32_768)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--query-lens", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--kv-dtype", default="fp8")
    parser.add_argument("--index-dtype", default="fp8")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
