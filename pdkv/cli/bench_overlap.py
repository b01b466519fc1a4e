"""``pdkv bench overlap``: what of a transfer prefill hides."""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, ending, keep_lines
from pdkv.daemons.config import UpConfig, load

WRONG = 4
"""Exit code: an answer was wrong."""

_EXAMPLES = """
Examples:

  pdkv bench overlap
  pdkv bench overlap --tokens 8192 --prefill-chunk 2048 --layer-groups 1
  pdkv bench overlap --transport sockets --max-pull-gbps 0.2 --json

Exit code 4 when an answer is wrong.
"""


def add_to(bench: typer.Typer) -> None:
    """Make it a command of ``pdkv bench``."""
    bench.command("overlap", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)(overlap)


def overlap(  # noqa: PLR0913  a command's parameters are its flags
    *,
    tokens: Annotated[int, typer.Option(metavar="N", min=64, help="Length of the long prompts.")] = 32_768,
    repeats: Annotated[int, typer.Option(metavar="N", min=1, help="Long prompts.")] = 1,
    short: Annotated[int, typer.Option(metavar="N", min=0, help="Short prompts, for the hops.")] = 20,
    transport: Annotated[str, typer.Option(metavar="NAME", help="What moves pages, as for pdkv up.")] = "sockets",
    prefill_chunk: Annotated[int, typer.Option(metavar="N", min=1, help="Prompt tokens computed at a time.")] = 512,
    layer_groups: Annotated[int, typer.Option(metavar="N", min=1, help="Parts of the last chunk's layers.")] = 4,
    max_pull_gbps: Annotated[float, typer.Option(metavar="N", min=0, help="Limit of decode's reads; 0 = none.")] = 0.0,
    verify_pages: Annotated[str, typer.Option(metavar="off|sample|full", help="Digests that are compared.")] = "off",
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of K/V.")] = "auto",
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Of the prompts.")] = 1,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Show what the workers log.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Time how long after prefill the last byte of a long prompt's state lands, against its transfer alone.

    A prefill and a decode worker serve the demo's checkpoint. Short prompts afterwards, asked in turn with an undivided
    worker behind the same HTTP front, time what dividing adds to the first token, hop by hop.
    """

    def run() -> int:
        from pdkv.bench import overlap as bench  # noqa: PLC0415
        from pdkv.daemons.logs import configure_logging  # noqa: PLC0415
        from pdkv.verify.link_chasing_checkpoint import write_checkpoint  # noqa: PLC0415

        level = "info" if verbose else "error"
        with tempfile.TemporaryDirectory(prefix="pdkv-bench-") as folder:
            model = Path(folder) / "link-chasing"
            write_checkpoint(model)
            flags: dict[str, object] = {
                "model": model,
                "port": 0,
                "max_model_len": tokens + bench.STEPS,
                "max_batch": 2,  # room for another prompt beside the longest, as a worker in use has
                "request_timeout": 1800.0,
                "transport": transport,
                "prefill_chunk": prefill_chunk,
                "layer_groups": layer_groups,
                "max_pull_gbps": max_pull_gbps,
                "verify_pages": verify_pages,
                "kv_dtype": kv_dtype,
                "log_level": level,
            }
            configure_logging(level, "bench")
            report = bench.run(
                bench.OverlapPlan(load(UpConfig, flags), tokens, repeats, short, seed), _telling(verbose)
            )
        sys.stdout.write((msgspec.json.encode(report).decode() if as_json else bench.table(report)) + "\n")
        return 0 if report.right else WRONG

    ending(run)


def _telling(verbose: bool) -> Callable[[str], None]:
    def tell(step: str) -> None:
        if verbose:
            sys.stderr.write(step + "\n")

    return tell
