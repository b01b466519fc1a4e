"""``pdkv bench``: what a move costs, beside other movers."""

import shlex
import sys
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli import bench_overlap, bench_serve
from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.errors import ConfigError

app = command_module()
bench = typer.Typer(rich_markup_mode=None, help="Measure what a move costs, beside other movers.", no_args_is_help=True)
app.add_typer(bench, name="bench")
bench.callback()(lambda: None)
bench_serve.add_to(bench)
bench_overlap.add_to(bench)

WRONG = 4
"""Exit code: bytes of ours came over wrong, or not at all."""

_EXAMPLES = """
Examples:

  pdkv bench xfer
  pdkv bench xfer --tokens 32768 --tp 4 --kv-dtype fp8 --vs nixl,mooncake --json
  pdkv bench xfer --device cuda --tokens 131072 --vs nixl,ucx
  pdkv bench xfer --path tcp --source-prefix "ip netns exec far" --host 10.9.0.1

Other movers come from `make bench-tools`. Exit code 4 when bytes of ours came over wrong.
"""


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def gpu_pair(text: str) -> tuple[int, ...]:
    """Two numbers of GPUs, or none. Raises ``ConfigError``."""
    names = _names(text)
    if names and not (len(names) == 2 and all(name.isdecimal() for name in names)):
        raise ConfigError(f"--gpus {text!r} is not two numbers of GPUs, as 0,1")
    return tuple(int(name) for name in names)


def _show(step: str) -> None:
    """On a line of its own, for whoever watches."""
    if sys.stderr.isatty():
        sys.stderr.write(f"\r\033[K{step}")
        sys.stderr.flush()


@bench.command("xfer", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def xfer(  # noqa: PLR0913  a command's parameters are its flags
    *,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompt whose state moves.")] = 32_768,
    tp: Annotated[int, typer.Option(metavar="N", help="Ranks; the state of one of them moves.")] = 4,
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of K/V.")] = "fp8",
    index_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of index keys.")] = "fp8",
    layout: Annotated[str, typer.Option(metavar="LIST", help="arena, per-layer.")] = "arena,per-layer",
    device: Annotated[
        str, typer.Option(metavar="KIND", help="auto, cpu or cuda; auto = cuda if there is one.")
    ] = "auto",
    path: Annotated[str, typer.Option(metavar="LIST", help="shm, tcp, cuda_ipc; by the device if not given.")] = "",
    gpus: Annotated[str, typer.Option(metavar="A,B", help="Source's and reader's; the first two, or one twice.")] = "",
    vs: Annotated[str, typer.Option(metavar="LIST", help="Rivals: nixl, mooncake, ucx.")] = "",
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Moves of each contestant.")] = 5,
    tools: Annotated[Path, typer.Option(metavar="DIR", help="Where the rivals are installed.")] = Path(".venv-bench"),
    source_prefix: Annotated[str, typer.Option(metavar="CMD", help="Before the source's command.")] = "",
    host: Annotated[str, typer.Option(metavar="ADDR", help="The source's address.")] = "127.0.0.1",
    chart: Annotated[Path | None, typer.Option(metavar="FILE", help="Write bars as SVG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Move the state of one prompt of MiniMax-M3 between two processes, in turn with others, and check every byte."""

    def run() -> int:
        from pdkv.bench import chart as charts  # noqa: PLC0415
        from pdkv.bench import race
        from pdkv.bench.geometry import Workload  # noqa: PLC0415

        plan = race.checked(
            race.Plan(
                Workload(tokens, tp, kv_dtype, index_dtype),
                _names(path) or race.paths_of(device),
                _names(layout),
                _names(vs),
                repeats,
                tools,
                tuple(shlex.split(source_prefix)),
                host,
                gpu_pair(gpus),
            )
        )
        report = race.run(plan, _show)
        _show("")
        if chart is not None:
            chart.write_text(charts.svg(report), encoding="utf-8")
        sys.stdout.write((msgspec.json.encode(report).decode() if as_json else charts.table(report)) + "\n")
        return 0 if all(result.correct for result in report.results if result.contestant == "pdkv") else WRONG

    ending(run)


_CHART_EXAMPLES = """
Examples:

  pdkv bench xfer --json > run.json && pdkv bench chart run.json --output run.svg
  pdkv bench chart run.json --markdown
"""


@bench.command("chart", epilog=keep_lines(_CHART_EXAMPLES), context_settings=CONTEXT)
def chart(
    report: Annotated[Path, typer.Argument(metavar="FILE", help="What pdkv bench xfer --json printed.")],
    output: Annotated[Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write bars as SVG.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table for a document.")] = False,
) -> None:
    """Show a race that was run before: as a table, and as bars."""

    def run() -> int:
        from pdkv.bench import chart as charts  # noqa: PLC0415

        found = charts.read(report)
        if output is not None:
            output.write_text(charts.svg(found), encoding="utf-8")
        sys.stdout.write((charts.markdown(found) if markdown else charts.table(found)) + "\n")
        return 0

    ending(run)


_PLAN_EXAMPLES = """
Examples:

  pdkv bench plan
  pdkv bench plan --tokens 131072 --tp 1 --json
"""


@bench.command("plan", epilog=keep_lines(_PLAN_EXAMPLES), context_settings=CONTEXT)
def plan(
    *,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Length of the prompt.")] = 131_072,
    tp: Annotated[int, typer.Option(metavar="N", help="Ranks; the reads of one of them are planned.")] = 4,
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of K/V.")] = "fp8",
    index_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of index keys.")] = "fp8",
    requests: Annotated[int, typer.Option(metavar="N", min=1, help="Requests that use the pages first.")] = 10_000,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Time the planning of a transfer, and count spans once page pools have seen many requests."""

    def run() -> int:
        from pdkv.bench import planning  # noqa: PLC0415
        from pdkv.bench.geometry import Workload  # noqa: PLC0415

        report = planning.measure(Workload(tokens, tp, kv_dtype, index_dtype), requests)
        if as_json:
            sys.stdout.write(msgspec.json.encode(report).decode() + "\n")
            return 0
        for cost in report.costs:
            sys.stdout.write(
                f"{cost.layout}: {cost.raw_spans:,} regions of pages become {cost.spans:,} spans in "
                f"{cost.plan_ms:.2f} ms of CPU, and {cost.copy_ms:.2f} ms to hand over\n"
            )
        used = report.churn
        sys.stdout.write(
            f"after {used.requests:,} requests: {used.spans_per_transfer} spans for {used.pages_per_transfer} pages\n"
        )
        return 0

    ending(run)
