"""``pdkv keys``: key pairs for the control channel."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

if TYPE_CHECKING:
    from pdkv.daemons.control_keys import KeysShown

app = command_module()
_keys = typer.Typer(
    help="Make and show the keys by which workers know each other.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
app.add_typer(_keys, name="keys")
_keys.callback()(lambda: None)

_JSON = typer.Option("--json", help="One JSON object.")

_NEW_EXAMPLES = """
Examples:

  pdkv keys new ./keys
  pdkv prefill --model ./checkpoint --control-keys ./keys

The simplest fleet shares one folder. The secret key is written with mode 0600 and shown nowhere; nothing is
overwritten. A worker also accepts every other *.public file of its folder.
"""

_SHOW_EXAMPLES = """
Examples:

  pdkv keys show ./keys
  pdkv keys show ./keys --json
"""


@_keys.command("new", epilog=keep_lines(_NEW_EXAMPLES), context_settings=CONTEXT)
def new(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the pair; made if it is not there.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Write a new key pair into a folder, for --control-keys."""

    def run() -> int:
        from pdkv.daemons import control_keys  # noqa: PLC0415  not for --help

        _print(control_keys.new_keys(folder), as_json)
        return 0

    ending(run)


@_keys.command("show", epilog=keep_lines(_SHOW_EXAMPLES), context_settings=CONTEXT)
def show(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of --control-keys.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Print the public keys that a folder makes a worker accept, its own first, with their fingerprints."""

    def run() -> int:
        from pdkv.daemons import control_keys  # noqa: PLC0415

        _print(control_keys.show_keys(folder), as_json)
        return 0

    ending(run)


def _print(shown: "KeysShown", as_json: bool) -> None:
    if as_json:
        typer.echo(msgspec.json.encode(shown).decode())
        return
    for key in shown.accepted:
        role = "own" if key.fingerprint == shown.fingerprint else "also accepted"
        typer.echo(f"{key.fingerprint}  {key.public}  {role:<13}  {', '.join(key.files) or '-'}")
