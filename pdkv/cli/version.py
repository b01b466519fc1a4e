"""``pdkv version``."""

from typing import Annotated

import typer

import pdkv
from pdkv.cli.lazy import CONTEXT, command_module

app = command_module()


@app.command("version", context_settings=CONTEXT)
def version(as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False) -> None:
    """Print the version."""
    typer.echo(f'{{"schema":"pdkv.version/v1","version":"{pdkv.__version__}"}}' if as_json else pdkv.__version__)
