"""``pdkv version``."""

from typing import Annotated

import typer

import pdkv
from pdkv.cli.lazy import CONTEXT, command_module

app = command_module()


@app.command("version", context_settings=CONTEXT)
def version(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Print the version; with --json also that of the protocol that workers speak, and Python's."""
    if not as_json:
        typer.echo(pdkv.__version__)
        return
    import msgspec  # noqa: PLC0415  not for --help

    from pdkv.daemons.version import Version  # noqa: PLC0415

    typer.echo(msgspec.json.encode(Version()).decode())
