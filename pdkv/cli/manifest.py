"""``pdkv manifest``: what a worker holds, and on what two disagree."""

from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

app = command_module()
_manifest = typer.Typer(
    help="Show what a worker holds of a token, or compare two workers.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
app.add_typer(_manifest, name="manifest")
_manifest.callback()(lambda: None)

INCOMPATIBLE = 6
"""Exit code: the two workers would refuse each other."""

_WHERE = "HTTP address of a prefill or decode worker, or a file that show --json was written to."
_JSON = typer.Option("--json", help="One JSON object.")

_SHOW_EXAMPLES = """
Examples:

  pdkv manifest show http://127.0.0.1:8100
  pdkv manifest show http://127.0.0.1:8100 --json > prefill.json
"""

_DIFF_EXAMPLES = """
Examples:

  pdkv manifest diff http://127.0.0.1:8100 http://127.0.0.1:8200
  pdkv manifest diff prefill.json http://127.0.0.1:8200 --json

Exit code 0 when the two fit together, 6 when not. What is compared is what a handshake compares, and the tokenizer.
"""


@_manifest.command("show", epilog=keep_lines(_SHOW_EXAMPLES), context_settings=CONTEXT)
def show(
    source: Annotated[str, typer.Argument(metavar="URL|FILE", help=_WHERE)], as_json: Annotated[bool, _JSON] = False
) -> None:
    """Show every region that a worker holds, on each of its ranks."""

    def run() -> int:
        from pdkv.daemons import manifest_view  # noqa: PLC0415  not for --help

        found = manifest_view.load(source)
        typer.echo(msgspec.json.encode(found).decode() if as_json else manifest_view.told_of(found))
        return 0

    ending(run)


@_manifest.command("diff", epilog=keep_lines(_DIFF_EXAMPLES), context_settings=CONTEXT)
def diff(
    source_a: Annotated[str, typer.Argument(metavar="A", help=_WHERE)],
    source_b: Annotated[str, typer.Argument(metavar="B", help="Likewise.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Name everything on which two workers disagree."""

    def run() -> int:
        from pdkv.daemons import manifest_view  # noqa: PLC0415

        found = manifest_view.compare(source_a, source_b)
        typer.echo(msgspec.json.encode(found).decode() if as_json else manifest_view.told_difference(found))
        return 0 if found.compatible else INCOMPATIBLE

    ending(run)
