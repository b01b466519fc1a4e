"""``pdkv ping`` and ``pdkv drain``: a running daemon's admin port, from a shell."""

from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

app = command_module()

NOT_DRAINED = 7
"""Exit code: requests still ran when the wait was over."""

_URL = typer.Argument(metavar="URL", help="Address of a daemon's admin port, as http://127.0.0.1:8090.")
_JSON = typer.Option("--json", help="One JSON object.")

_PING_EXAMPLES = """
Examples:

  pdkv ping http://127.0.0.1:8090
  pdkv ping http://127.0.0.1:8190 --ready --json

Exit code 0 when all conditions hold, else 1.
"""

_DRAIN_EXAMPLES = """
Examples:

  pdkv drain http://127.0.0.1:8190
  pdkv drain http://127.0.0.1:8190 --wait 60

The daemon goes on running and refuses requests; a signal ends it. Exit code 7 when requests still ran after --wait.
"""


@app.command("ping", epilog=keep_lines(_PING_EXAMPLES), context_settings=CONTEXT)
def ping(
    url: Annotated[str, _URL],
    ready: Annotated[bool, typer.Option("--ready", help="Ask whether it is ready, not only live.")] = False,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Ask a router or worker whether it is well, and what is wrong otherwise."""

    def run() -> int:
        from pdkv.daemons import operating  # noqa: PLC0415  not for --help

        answer = operating.ping(url, ready=ready)
        typer.echo(msgspec.json.encode(answer).decode() if as_json else operating.told(answer))
        return 0 if answer.verdict.ok else 1

    ending(run)


@app.command("drain", epilog=keep_lines(_DRAIN_EXAMPLES), context_settings=CONTEXT)
def drain(
    url: Annotated[str, _URL],
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=0, help="For requests that run, at most.")] = 0.0,
    as_json: Annotated[bool, _JSON] = False,
) -> None:
    """Have a router or worker take no more requests; those that run go on."""

    def run() -> int:
        from pdkv.daemons import operating  # noqa: PLC0415

        done = operating.drain(url, wait, lambda line: typer.echo(line, err=True))
        left = f"{done.in_flight} still run" if done.in_flight else "none is left"
        text = f"{done.url} takes no more requests; {left}"
        typer.echo(msgspec.json.encode(done).decode() if as_json else text)
        return NOT_DRAINED if wait and done.in_flight else 0

    ending(run)
