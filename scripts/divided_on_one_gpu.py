"""One long prompt of M3's real dimensions on one GPU: prefill and decode processes against the undivided engine.

    python scripts/divided_on_one_gpu.py --layers 6 --dense 2 --tokens 65536

Random weights. First one process answers undivided and ends; then a prefill and a decode process share the GPU, and
decode reads the pages over CUDA IPC. Ends with 1 when a token differs. Six layers need 60 GB of weights a process.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import msgspec

from pdkv.daemons.link import WorkerSettings
from pdkv.verify.engine_processes import ProcessPair
from pdkv.verify.m3_shapes import write_config
from pdkv.verify.pair import worker_settings

_UNDIVIDED = "undivided"


def main() -> int:
    options = _parse()
    prompt = _prompt(options.tokens)
    if options.part == _UNDIVIDED:
        return _answer_undivided(options, prompt)
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_config(model, options.layers, options.dense)
        command = [sys.executable, __file__, *sys.argv[1:], "--part", _UNDIVIDED, "--model", folder]
        alone = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()[-1])
        print(f"undivided: {alone['seconds']:.2f} s, tokens {alone['tokens']}", flush=True)
        started = time.perf_counter()
        with ProcessPair(_settings(options, model, "prefill"), _settings(options, model, "decode")) as pair:
            print(f"pair ready after {time.perf_counter() - started:.1f} s: {pair.decode_ready.transport}", flush=True)
            for _ in range(options.times):
                answer = pair.ask(prompt, options.generate)
                report = answer.report
                print(
                    f"divided: {answer.seconds:.2f} s, tokens {list(answer.token_ids)}; {report.num_pages} pages, "
                    f"{report.num_bytes:,} bytes in {report.num_spans} spans over {report.path}, reads outstanding "
                    f"{report.read_s:.3f} s, {report.bytes_before_done:,} bytes before prefill was done",
                    flush=True,
                )
                if list(answer.token_ids) != alone["tokens"]:
                    print("DIFFERENT", flush=True)
                    return 1
    print("equal")
    return 0


def _settings(options: argparse.Namespace, model: Path, role: str) -> WorkerSettings:
    room = options.tokens + options.generate
    return msgspec.structs.replace(
        worker_settings(role, model, room, -(-room // 128) + 2, options.chunk),
        device="cuda",
        transport="auto",
        load_format="dummy",
        require_transport="cuda_ipc",
        kv_dtype=options.kv_dtype,
        index_dtype=options.index_dtype,
    )


def _answer_undivided(options: argparse.Namespace, prompt: tuple[int, ...]) -> int:
    import torch  # noqa: PLC0415  the parent goes without

    from pdkv.m3.engine import Engine  # noqa: PLC0415
    from pdkv.m3.model import load_model  # noqa: PLC0415
    from pdkv.m3.requests import CompleteRequest, EngineSettings, RequestId, TokenGenerated, singly  # noqa: PLC0415
    from pdkv.m3.sampling import SamplingParams  # noqa: PLC0415
    from pdkv.verify.undivided import local_worker  # noqa: PLC0415

    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    room = options.tokens + options.generate
    model = load_model(options.model, device="cuda:0", load_format="dummy")
    settings = EngineSettings(max_model_len=room, prefill_chunk=options.chunk, max_batch=1)
    engine: Engine = local_worker(model, -(-room // 128) + 2, settings, options.kv_dtype, options.index_dtype).engine
    request = CompleteRequest(
        id=RequestId(b"alone"),
        prompt=prompt,
        max_tokens=options.generate,
        sampling=SamplingParams(),
        ignore_eos=True,
    )
    started = time.perf_counter()
    events = engine.submit(request)
    while engine.has_work:
        events += engine.step()
    tokens = [event.token for event in singly(events) if isinstance(event, TokenGenerated)]
    print(json.dumps({"seconds": time.perf_counter() - started, "tokens": tokens}))
    return 0


def _prompt(num_tokens: int) -> tuple[int, ...]:
    drawn = random.Random(num_tokens)
    return tuple(drawn.randrange(200_064) for _ in range(num_tokens))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--dense", type=int, default=2, help="dense layers among them")
    parser.add_argument("--tokens", type=int, default=65_536, help="of the prompt")
    parser.add_argument("--generate", type=int, default=16)
    parser.add_argument("--times", type=int, default=2, help="that the pair is asked")
    parser.add_argument("--chunk", type=int, default=4096)
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--index-dtype", default="auto")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, default=Path(), help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
