"""``pdkv bench serve``: concurrent clients of a divided deployment, beside the undivided engine."""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, ending, keep_lines
from pdkv.daemons.config import UpConfig, load
from pdkv.errors import ConfigError

WRONG, FAILED = 4, 1
"""Exit codes: an answer was wrong, or nothing can be told of them; a request had none."""
_API_KEY = "OPENAI_API_KEY"
"""The variable that OpenAI's client reads, and other servers' benches."""

_EXAMPLES = """
Examples:

  pdkv bench serve
  pdkv bench serve --model ./checkpoint --concurrency 8 --requests 64 --input-tokens 4096 --output-tokens 64
  pdkv bench serve --url http://127.0.0.1:8000 --model ./checkpoint --no-undivided --json
  pdkv bench serve --device cuda --m3-layers 4 --concurrency 8 --input-tokens 32768 --kv-dtype fp8 --index-dtype fp8
  pdkv bench serve --device cuda --m3-layers 4 --concurrency 8 --batch-invariant

Without --url it starts 1 prefill and 1 decode worker; --config may ask for more, as for pdkv up. Without --model it
serves the demo's checkpoint. With several GPUs each worker has its own, and as many undivided engines share the load.
A server that asks for an API key gets that of OPENAI_API_KEY.
Exit code 4 when an answer is wrong or none can be judged, 1 when a request failed.
"""


def add_to(bench: typer.Typer) -> None:
    """Make it a command of ``pdkv bench``."""
    bench.command("serve", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)(serve)


def serve(  # noqa: PLR0913  a command's parameters are its flags
    *,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Checkpoint to serve, or that --url serves.")
    ] = None,
    url: Annotated[str, typer.Option(metavar="URL", help="A server that runs; nothing is started then.")] = "",
    config: Annotated[Path | None, typer.Option(metavar="FILE", help="YAML file with settings of pdkv up.")] = None,
    concurrency: Annotated[int, typer.Option(metavar="N", min=1, help="Clients at a time.")] = 4,
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests in all.")] = 16,
    input_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of each prompt.")] = 1024,
    output_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of each answer.")] = 32,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompts.")] = 0,
    device: Annotated[str, typer.Option(metavar="KIND", help="cpu or cuda.")] = "cpu",
    transport: Annotated[str, typer.Option(metavar="NAME", help="What moves pages, as for pdkv up.")] = "auto",
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of K/V.")] = "auto",
    index_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of index keys.")] = "auto",
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="Compute each request as if alone, and compare every bit.")
    ] = False,
    m3_layers: Annotated[
        int, typer.Option(metavar="N", min=0, help="Random weights of M3's dimensions, so many layers, one dense.")
    ] = 0,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="That one request may take.")] = 600.0,
    undivided: Annotated[
        bool, typer.Option("--undivided/--no-undivided", help="Ask one whole engine the same afterwards.")
    ] = True,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the workers log.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Ask a prefill and a decode worker, and one undivided engine on the same machine, the same questions.

    Clients speak HTTP and have their answers streamed, each its next when the last has ended. Shown are percentiles of
    the time to the first token, between tokens and of whole answers, and of the transfer what prefill did not hide.
    """

    def run() -> int:
        from pdkv.bench import serve as bench  # noqa: PLC0415
        from pdkv.bench.serve_load import Load  # noqa: PLC0415
        from pdkv.daemons.logs import configure_logging  # noqa: PLC0415

        is_demo = _is_demo(model, url, m3_layers)
        judges = undivided and not is_demo and (model is not None or bool(m3_layers))
        asked = Load(concurrency, requests, input_tokens, output_tokens, seed, judges)
        flags: dict[str, object] = {
            "port": 0,
            "max_model_len": input_tokens + output_tokens,
            "max_batch": concurrency,
            "request_timeout": timeout,
            "log_level": "info" if verbose else "error",
        }
        given = {"device": device, "transport": transport, "kv_dtype": kv_dtype, "index_dtype": index_dtype}
        flags |= {name: value for name, value in given.items() if value not in ("auto", "cpu")}
        if m3_layers:
            flags["load_format"] = "dummy"
        if batch_invariant:
            flags["batch_invariant"] = True
        with _model(model, url, m3_layers) as folder:
            up = load(UpConfig, {**flags, "model": folder}, config) if folder is not None else None
            configure_logging("info" if verbose else "error", "bench")
            plan = bench.ServePlan(asked, up, url, undivided, is_demo, timeout, os.environ.get(_API_KEY, ""))
            report = bench.run(plan, _telling(verbose))
        _clear()
        sys.stdout.write((msgspec.json.encode(report).decode() if as_json else bench.table(report)) + "\n")
        return WRONG if report.answers.wrong or report.answers.undecided else FAILED if report.failed else 0

    ending(run)


def _is_demo(given: Path | None, url: str, m3_layers: int) -> bool:
    return given is None and not url and not m3_layers


@contextlib.contextmanager
def _model(given: Path | None, url: str, m3_layers: int) -> Iterator[Path | None]:
    """The checkpoint: the one that is given, none where only a URL is, else one made for as long as it takes: of M3's
    dimensions, or the demo's."""
    if m3_layers and (given is not None or url):
        raise ConfigError("--m3-layers makes a model of its own; leave out --model and --url")
    if given is not None or url:
        if given is not None and not (given / "config.json").is_file():
            raise ConfigError(f"--model {given} holds no config.json; it must be a checkpoint's folder")
        yield given
        return
    from pdkv.verify.link_chasing_checkpoint import write_checkpoint  # noqa: PLC0415
    from pdkv.verify.m3_shapes import write_config  # noqa: PLC0415

    with tempfile.TemporaryDirectory(prefix="pdkv-bench-") as folder:
        if m3_layers:
            write_config(Path(folder) / "m3", m3_layers, 1)
            yield Path(folder) / "m3"
            return
        write_checkpoint(Path(folder) / "link-chasing")
        yield Path(folder) / "link-chasing"


def _telling(verbose: bool) -> Callable[[str], None]:
    """On one line for whoever watches; with ``verbose`` every line is kept."""

    def tell(step: str) -> None:
        if verbose:
            sys.stderr.write(step + "\n")
        elif sys.stderr.isatty():
            sys.stderr.write(f"\r\033[K{step[:100]}")
        sys.stderr.flush()

    return tell


def _clear() -> None:
    if sys.stderr.isatty():
        sys.stderr.write("\r\033[K")
