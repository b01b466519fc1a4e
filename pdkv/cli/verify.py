"""``pdkv verify``: is every byte of the state there, and would we notice if it were not?"""

from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.errors import ConfigError, PdkvError

app = command_module()

_EXAMPLES = """
Examples:

  pdkv verify --suite smoke
  pdkv verify --suite smoke --report ./verify-report
  pdkv verify --suite smoke --mutate drop:index_k

Exit codes: 0 right, 4 wrong, 5 could not tell (no prompt beyond the blind window, say).
"""


@app.command("verify", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def verify(
    suite: Annotated[str, typer.Option(metavar="NAME", help="Which suite: smoke.")] = "smoke",
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Prompt lengths in tokens, instead of the suite's own.")
    ] = None,
    mutate: Annotated[
        str | None, typer.Option(metavar="drop:REGION|zero:REGION", help="Lose a region on purpose; must end with 4.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompts.")] = 1,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of the summary.")] = False,
) -> None:
    """Send prompts with known answers through prefill and decode, and compare every byte and token.

    Each kind of region is then dropped and zeroed in turn: these controls must be caught, or the run has proved
    nothing. Lost index keys cannot show up to topk x 128 tokens; the suite therefore goes beyond.
    """
    ending(lambda: _run(suite, _numbers(lengths), mutate, seed, report, as_json=as_json))


def _run(
    suite: str, lengths: tuple[int, ...] | None, mutate: str | None, seed: int, folder: Path | None, *, as_json: bool
) -> int:
    from pdkv.daemons.logs import configure_logging  # noqa: PLC0415  torch below, and so not for --help
    from pdkv.verify.report import summary  # noqa: PLC0415
    from pdkv.verify.suite import SuiteOptions, run_suite  # noqa: PLC0415

    if suite != "smoke":
        raise ConfigError(f"--suite {suite!r}: there is one suite, smoke")
    configure_logging("warning", "verify")
    options = SuiteOptions(name=suite, seed=seed, mutate=mutate)
    if lengths is not None:
        options = msgspec.structs.replace(options, lengths=lengths)
    if folder is not None:
        _make(folder)  # before a minute is spent
    result = run_suite(options, lambda line: typer.echo(line, err=True))
    encoded = msgspec.json.encode(result)
    if folder is not None:
        path = folder / "report.json"
        path.write_bytes(msgspec.json.format(encoded, indent=2))
        typer.echo(f"report: {path}", err=True)
    typer.echo(encoded.decode() if as_json else summary(result))
    return result.exit_code


def _numbers(text: str | None) -> tuple[int, ...] | None:
    from pdkv.verify.link_chasing import MAX_TOKENS, MIN_TOKENS  # noqa: PLC0415

    if text is None:
        return None
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"--lengths {text!r}: expected numbers separated by commas") from None
    if not all(MIN_TOKENS <= number <= MAX_TOKENS for number in numbers):
        raise typer.BadParameter(f"--lengths: a prompt has {MIN_TOKENS} to {MAX_TOKENS:,} tokens")
    return numbers


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise PdkvError(f"cannot make the report folder {folder}: {exc.strerror or exc}") from exc
