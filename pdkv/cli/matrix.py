"""``pdkv matrix``: does every pair of rank counts answer right, in every kind of cache, and what does it move?"""

from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

if TYPE_CHECKING:
    from pdkv.verify.matrix import CacheKind

app = command_module()

WRONG_ANSWER = 4
"""Exit code: the run was complete and an answer is wrong."""

_EXAMPLES = """
Examples:

  pdkv matrix
  pdkv matrix --tp 1,2 --cache fp8/fp8 --cache bfloat16/bfloat16/2 --json
  pdkv matrix --tp 1,2 --cache fp8/fp8 --device cuda

Exit code 4 when one of the answers is wrong.
"""


@app.command("matrix", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def matrix(
    tp: Annotated[str, typer.Option(metavar="N,N", help="Rank counts of prefill and of decode workers.")] = "1,2,4,8",
    cache: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KV/INDEX[/FREQ]",
            help="Kind of cache, as fp8/fp8 or fp8/fp8/2, where every second sparse layer selects; repeatable. [eight]",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(metavar="N", min=2049, max=100_000, help="Prompt length in tokens.")] = 3072,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompts.")] = 1,
    device: Annotated[
        str, typer.Option(metavar="KIND", help="cpu or cuda; rank r of a worker takes the r-th GPU.")
    ] = "cpu",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
) -> None:
    """Start prefill and decode workers of every rank count, and let each pair of them answer a long prompt.

    Prints for each pair and kind of cache the bytes and spans that a page takes, whether the answer is right, and the
    peak memory. The link-chasing checkpoint is used: its answers are known, and hang on every region. All pairs of
    eight kinds take about a quarter of an hour on two cores.
    """

    def run() -> int:
        from pdkv.daemons.local import print_to_stderr  # noqa: PLC0415  not for --help
        from pdkv.daemons.logs import configure_logging  # noqa: PLC0415
        from pdkv.verify.matrix import DEFAULT_KINDS, MatrixOptions, run_matrix, table  # noqa: PLC0415

        if device not in ("cpu", "cuda"):
            raise typer.BadParameter(f"--device {device!r}: expected cpu or cuda")
        kinds = tuple(map(_kind, cache)) if cache else DEFAULT_KINDS
        options = MatrixOptions(ranks=_ranks(tp), kinds=kinds, num_tokens=tokens, seed=seed, device=device)
        configure_logging("warning", "matrix")
        report = run_matrix(options, lambda line: typer.echo(line, err=True), print_to_stderr)
        typer.echo(msgspec.json.encode(report).decode() if as_json else table(report))
        return 0 if report.right else WRONG_ANSWER

    ending(run)


def _ranks(text: str) -> tuple[int, ...]:
    try:
        ranks = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--tp {text!r}: expected numbers separated by commas") from None
    if not all(rank in (1, 2, 4, 8) for rank in ranks):
        raise typer.BadParameter(f"--tp {text!r}: the link-chasing checkpoint is divided among 1, 2, 4 or 8 ranks")
    return ranks


def _kind(text: str) -> "CacheKind":
    from pdkv.verify.matrix import CacheKind  # noqa: PLC0415

    match text.split("/"):
        case [kv, index]:
            return CacheKind(kv, index)
        case [kv, index, freq] if freq.isdecimal() and int(freq) > 0:
            return CacheKind(kv, index, int(freq))
    raise typer.BadParameter(f"--cache {text!r}: expected KV/INDEX or KV/INDEX/FREQ, for example fp8/fp8/2")
