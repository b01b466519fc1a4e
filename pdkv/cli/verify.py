"""``pdkv verify``: is every byte of the state there, and would we notice if it were not?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.errors import ConfigError, PdkvError

if TYPE_CHECKING:
    from pdkv.verify.suite import SuiteOptions

app = command_module()

_EXAMPLES = """
Examples:

  pdkv verify --suite smoke
  pdkv verify --suite smoke --report ./verify-report
  pdkv verify --suite smoke --mutate drop:index_k
  pdkv verify --suite smoke --kv-dtype fp8 --index-dtype fp8 --index-topk-freq 2

Exit codes: 0 right, 4 wrong, 5 could not tell (no prompt beyond the blind window, say).
"""


@app.command("verify", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def verify(  # noqa: PLR0913  a command's parameters are its flags
    *,
    suite: Annotated[str, typer.Option(metavar="NAME", help="Which suite: smoke.")] = "smoke",
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N", help="Prompt lengths in tokens, instead of the suite's own.")
    ] = None,
    mutate: Annotated[
        str | None, typer.Option(metavar="drop:REGION|zero:REGION", help="Lose a region on purpose; must end with 4.")
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompts.")] = 1,
    kv_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Storage of K/V: float32, bfloat16, float16, fp8, fp8_unit, fp8_e5m2.")
    ] = "auto",
    index_dtype: Annotated[
        str, typer.Option(metavar="NAME", help="Storage of index keys: float32, bfloat16, float16, fp8.")
    ] = "auto",
    index_topk_freq: Annotated[
        int, typer.Option(metavar="N", min=1, help="Every N-th sparse layer selects, those between reuse it.")
    ] = 1,
    report: Annotated[Path | None, typer.Option(metavar="DIR", help="Write report.json there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report instead of the summary.")] = False,
) -> None:
    """Send prompts with known answers through prefill and decode, and compare every byte and token.

    Each kind of region is then dropped and zeroed in turn: these controls must be caught, or the run has proved
    nothing. Lost index keys cannot show up to topk x 128 tokens; the suite therefore goes beyond.
    """

    def run() -> int:
        from pdkv.verify.suite import SuiteOptions  # noqa: PLC0415

        options = SuiteOptions(
            name=suite,
            seed=seed,
            mutate=mutate,
            kv_dtype=kv_dtype,
            index_dtype=index_dtype,
            index_topk_freq=index_topk_freq,
        )
        return _run(options if chosen is None else msgspec.structs.replace(options, lengths=chosen), report, as_json)

    chosen = _numbers(lengths)
    ending(run)


def _run(options: "SuiteOptions", folder: Path | None, as_json: bool) -> int:
    from pdkv.daemons.logs import configure_logging  # noqa: PLC0415  torch below, and so not for --help
    from pdkv.verify.report import summary  # noqa: PLC0415
    from pdkv.verify.suite import run_suite  # noqa: PLC0415

    if options.name != "smoke":
        raise ConfigError(f"--suite {options.name!r}: there is one suite, smoke")
    configure_logging("warning", "verify")
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
