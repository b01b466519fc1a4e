"""One long prompt of M3's real dimensions: prefill and decode processes on one GPU or two against the undivided engine.

    python scripts/divided_on_one_gpu.py --layers 6 --dense 2 --tokens 65536
    python scripts/divided_on_one_gpu.py --gpus 0,1 --layers 4 --dense 1 --tokens 32768 --times 4 --json run.json

Random weights. First one process answers undivided and ends; then a prefill and a decode process share the GPU, or have
one each, and decode reads the pages over CUDA IPC. Shown is how long after the end of prefill the last byte landed, as
a share of prefill too; every time is asked a prompt of its own, and the first is not counted where there are more:
kernels are compiled in it. Ends with 1 when a token differs. Six layers need 60 GB of weights a process.

With ``--device cpu`` and ``--model`` (a folder with a small config.json) the same runs without a GPU.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from pdkv.bench.serve_load import exposed_share
from pdkv.daemons.gpu_order import VARIABLE, visible_gpus
from pdkv.daemons.link import TransferReport, WorkerSettings
from pdkv.daemons.worker_settings import worker_settings
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.m3_shapes import write_config

if TYPE_CHECKING:
    from pdkv.m3.engine import Engine

_UNDIVIDED = "undivided"


class Asked(NamedTuple):
    """One prompt. Seconds."""

    undivided_s: float
    divided_s: float
    prefill_s: float
    """From Granted to P's Done."""
    exposed_s: float
    """From P's Done to the last byte."""
    exposed_share: float
    hidden_fraction: float
    num_bytes: int
    num_spans: int
    read_s: float
    path: str
    equal: bool


def main() -> int:
    options = _parse()
    if options.part == _UNDIVIDED:
        return _answer_undivided(options)
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            options.model = Path(folder)
            write_config(options.model, options.layers, options.dense)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", _UNDIVIDED, "--model", str(options.model)]
        alone = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print("undivided: " + ", ".join(f"{one['seconds']:.2f} s" for one in alone), flush=True)
        asked = _divided(options, alone)
    counted = asked[1:] or asked
    share, exposed, prefill = (
        statistics.median(values)
        for values in zip(*((one.exposed_share, one.exposed_s, one.prefill_s) for one in counted), strict=True)
    )
    print(f"exposed after prefill: {exposed:.4f} s of {prefill:.3f} s = {share:.2%}; medians of {len(counted)}")
    if options.json is not None:
        options.json.write_text(json.dumps([one._asdict() for one in asked]))
    print("equal" if all(one.equal for one in asked) else "DIFFERENT")
    return 0 if all(one.equal for one in asked) else 1


def _divided(options: argparse.Namespace, alone: list[dict[str, object]]) -> list[Asked]:
    asked = []
    started = time.perf_counter()
    settings = (_settings(options, role) for role in ("prefill", "decode"))
    with ProcessPair(*settings, variables=_variables(options)) as pair:
        print(f"pair ready after {time.perf_counter() - started:.1f} s: {pair.decode_ready.transport}", flush=True)
        for number, single in enumerate(alone):
            answer = pair.ask(_prompt(options, number), options.generate)
            one = _asked(answer.report, answer.seconds, single, list(answer.token_ids))
            asked.append(one)
            print(
                f"divided: {one.divided_s:.2f} s (undivided {one.undivided_s:.2f}); prefill {one.prefill_s:.3f} s, "
                f"then {one.exposed_s:.4f} s exposed = {one.exposed_share:.2%}; {one.num_bytes:,} bytes in "
                f"{one.num_spans} spans over {one.path}, {one.hidden_fraction:.2%} before prefill was done, reads "
                f"outstanding {one.read_s:.4f} s{'' if one.equal else '; DIFFERENT'}",
                flush=True,
            )
    return asked


def _asked(report: TransferReport, seconds: float, alone: dict[str, object], tokens: list[int]) -> Asked:
    undivided = alone["seconds"]
    assert isinstance(undivided, float)
    return Asked(
        undivided_s=undivided,
        divided_s=seconds,
        prefill_s=report.total_s - report.granted_s - report.exposed_s,
        exposed_s=report.exposed_s,
        exposed_share=exposed_share(report),
        hidden_fraction=report.hidden_fraction,
        num_bytes=report.num_bytes,
        num_spans=report.num_spans,
        read_s=report.read_s,
        path=report.path,
        equal=tokens == alone["tokens"],
    )


def _variables(options: argparse.Namespace) -> tuple[dict[str, str], dict[str, str]]:
    """P's and D's environment: each sees its own GPU first, and the other one."""
    chosen = [int(number) for number in options.gpus.split(",") if number]
    if not chosen:
        return {}, {}
    seen = visible_gpus()
    if len(chosen) != 2 or max(chosen) >= len(seen):
        raise SystemExit(f"divided_on_one_gpu: --gpus {options.gpus} is not two of {len(seen)} GPUs")
    prefill, decode = (seen[number] for number in chosen)
    if prefill == decode:
        return {VARIABLE: prefill}, {VARIABLE: decode}
    return {VARIABLE: f"{prefill},{decode}"}, {VARIABLE: f"{decode},{prefill}"}


def _settings(options: argparse.Namespace, role: str) -> WorkerSettings:
    room = options.tokens + options.generate
    return msgspec.structs.replace(
        worker_settings(role, options.model, room, -(-room // 128) + 2, options.chunk),
        device=options.device,
        transport="auto",
        load_format="dummy",
        require_transport="cuda_ipc" if options.device == "cuda" else None,
        kv_dtype=options.kv_dtype,
        index_dtype=options.index_dtype,
        max_pull_gbps=options.max_pull_gbps,
        prefix_cache=False,
    )


def _answer_undivided(options: argparse.Namespace) -> int:
    import torch  # noqa: PLC0415  the parent goes without

    from pdkv.m3.model import load_model  # noqa: PLC0415
    from pdkv.m3.requests import EngineSettings  # noqa: PLC0415
    from pdkv.verify.undivided import local_worker  # noqa: PLC0415

    device = "cuda:0" if options.device == "cuda" else options.device
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    room = options.tokens + options.generate
    model = load_model(options.model, device=device, load_format="dummy")
    settings = EngineSettings(max_model_len=room, prefill_chunk=options.chunk, max_batch=1)
    engine = local_worker(model, -(-room // 128) + 2, settings, options.kv_dtype, options.index_dtype).engine
    print(json.dumps([_complete(engine, options, number) for number in range(options.times)]))
    return 0


def _complete(engine: "Engine", options: argparse.Namespace, number: int) -> dict[str, object]:
    from pdkv.m3.requests import CompleteRequest, RequestId, TokenGenerated, singly  # noqa: PLC0415
    from pdkv.m3.sampling import SamplingParams  # noqa: PLC0415

    request = CompleteRequest(
        id=RequestId(b"alone-%d" % number),
        prompt=_prompt(options, number),
        max_tokens=options.generate,
        sampling=SamplingParams(),
        ignore_eos=True,
    )
    started = time.perf_counter()
    events = engine.submit(request)
    while engine.has_work:
        events += engine.step()
    tokens = [event.token for event in singly(events) if isinstance(event, TokenGenerated)]
    return {"seconds": time.perf_counter() - started, "tokens": tokens}


def _prompt(options: argparse.Namespace, number: int) -> tuple[int, ...]:
    vocabulary = json.loads((options.model / "config.json").read_text())["vocab_size"]
    drawn = random.Random(f"{options.tokens} {number}")
    return tuple(drawn.choices(range(vocabulary), k=options.tokens))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dense", type=int, default=2, help="dense layers among them")
    parser.add_argument("--tokens", type=int, default=65_536, help="of each prompt")
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--times", type=int, default=3, help="prompts that both sides are asked, one after another")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--index-dtype", default="auto")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--gpus", default="", help="of prefill and of decode, as 0,1; default: the first for both")
    parser.add_argument("--max-pull-gbps", type=float, default=0.0, help="limit of decode's reads; 0 = none")
    parser.add_argument("--model", type=Path, help="folder of another config.json")
    parser.add_argument("--json", type=Path, help="write what each prompt took")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
