"""``pdkv top``: a deployment at a glance, look after look."""

from typing import Annotated

import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

app = command_module()

_EXAMPLES = """
Examples:

  pdkv top
  pdkv top --router http://127.0.0.1:8000 --once --json
  pdkv top --worker http://127.0.0.1:8100 --worker http://127.0.0.1:8290 --interval 5

Workers are asked for their admin ports. Rates and TTFT (time to first token) are of the time between two looks;
--once takes both, and prints what the second saw. circuit is what the router makes of a worker: closed (in use), slow
(used where no other is at hand), open (not used). tokens/s are prompts' on prefill, generated ones on decode.

A worker that does not answer is a row that says so. Exit code 1 when nothing at all answers, 130 by Ctrl-C.
"""


def _urls(given: list[str] | None) -> list[str]:
    for url in given or []:
        if not url.startswith(("http://", "https://")):
            raise typer.BadParameter(f"{url!r} is no URL, as http://127.0.0.1:8000")
    return given or []


def _url(given: str | None) -> str:
    return _urls([given])[0] if given else ""


@app.command("top", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def top(
    router: Annotated[
        str | None,
        typer.Option(
            metavar="URL", help="The router. [http://127.0.0.1:8000 without --worker, else none]", callback=_url
        ),
    ] = None,
    worker: Annotated[
        list[str] | None,
        typer.Option(
            metavar="URL", help="A worker, or its admin port; any number, beside the router's.", callback=_urls
        ),
    ] = None,
    interval: Annotated[float, typer.Option(metavar="SECONDS", min=0.1, help="Between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Print one view and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="A JSON object a look, on a line of its own.")] = False,
) -> None:
    """Show the workers of a router: are they well, how fast do they serve, what of pages and transfers is amiss?

    On a terminal the view is renewed in place; elsewhere, and with NO_COLOR, each look is printed behind the last.
    """

    def run() -> int:
        from pdkv.daemons.config import RouterConfig  # noqa: PLC0415  not for --help
        from pdkv.daemons.watching import Watch, watch  # noqa: PLC0415

        asked = router or ("" if worker else f"http://{RouterConfig.model_fields['listen'].default}")
        return watch(Watch(asked, tuple(worker or ()), interval, once, as_json))

    ending(run)
