"""``pdkv lease``: which pages of a prefill worker decode workers may read, and an end to one of them."""

from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

app = command_module()
_lease = typer.Typer(
    help="Look at a prefill worker's leases, or end one.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
app.add_typer(_lease, name="lease")
_lease.callback()(lambda: None)

_URL = typer.Argument(metavar="URL", help="Address of a prefill worker's admin port, as http://127.0.0.1:8190.")
_JSON = typer.Option("--json", help="One JSON object.")

_LS_EXAMPLES = """
Examples:

  pdkv lease ls http://127.0.0.1:8190
  pdkv lease ls http://127.0.0.1:8190 --json

A lease is granted with a transfer's pages, renewed by its decode worker every few seconds, and ends when
that has everything; one that is not renewed ends by itself.
"""

_RELEASE_EXAMPLES = """
Examples:

  pdkv lease release http://127.0.0.1:8190 3f2a

The transfer fails on both sides with the code lease_expired, and the router may try its request anew. The
pages come back when decode has let go, or when the lease ends: never while they may still be read.
"""


@_lease.command("ls", epilog=keep_lines(_LS_EXAMPLES), context_settings=CONTEXT)
def ls(url: Annotated[str, _URL], as_json: Annotated[bool, _JSON] = False) -> None:
    """List the leases that a prefill worker has granted, the oldest first."""

    def run() -> int:
        from pdkv.daemons import leases  # noqa: PLC0415  not for --help

        found = leases.list_leases(url)
        typer.echo(msgspec.json.encode(found).decode() if as_json else leases.told(found))
        return 0

    ending(run)


@_lease.command("release", epilog=keep_lines(_RELEASE_EXAMPLES), context_settings=CONTEXT)
def release(
    url: Annotated[str, _URL],
    transfer: Annotated[str, typer.Argument(metavar="ID", help="Transfer id, or its first digits.")],
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """End a lease: its transfer fails, and its pages come back as soon as nothing reads them."""

    def run() -> int:
        from pdkv.daemons import leases  # noqa: PLC0415

        done = leases.release_lease(url, transfer)
        lease = done.lease
        text = f"transfer {lease.transfer} of {lease.peer} ends; {lease.num_pages:,} pages come back when it has let go"
        typer.echo(msgspec.json.encode(done).decode() if as_json else text)
        return 0

    ending(run)
