"""``pdkv doctor`` and ``pdkv describe``: is this machine fit, is the way to that worker, and who is that worker?"""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines

if TYPE_CHECKING:
    from pdkv.daemons.doctor import DoctorOptions

app = command_module()

UNFIT = 3
"""Exit code: a check failed."""

_DOCTOR_EXAMPLES = """
Examples:

  pdkv doctor
  pdkv doctor --model ./checkpoint --peer http://127.0.0.1:8100 --min-gbps 1
  pdkv doctor --require-transport rdma --json

Exit code 3 when a check fails.
"""
_DESCRIBE_EXAMPLES = """
Examples:

  pdkv describe http://127.0.0.1:8100
  pdkv describe http://127.0.0.1:8200 --json
"""
_MARKS = {"ok": "ok  ", "warn": "WARN", "fail": "FAIL", "skip": "-   "}


@app.command("doctor", epilog=keep_lines(_DOCTOR_EXAMPLES), context_settings=CONTEXT)
def doctor(  # noqa: PLR0913  a command's parameters are its flags
    *,
    model: Annotated[Path | None, typer.Option(metavar="DIR", help="Checkpoint folder to look at.")] = None,
    peer: Annotated[str | None, typer.Option(metavar="URL", help="A prefill worker: handshake, probe, sweep.")] = None,
    min_gbps: Annotated[float, typer.Option(metavar="X", min=0, help="GB/s that the path to it must reach.")] = 0.0,
    require_transport: Annotated[
        str | None, typer.Option(metavar="PATH", help="rdma, cuda_ipc, shm or tcp: fail on a lesser path.")
    ] = None,
    max_model_len: Annotated[int, typer.Option(metavar="N", min=1, help="To size the arena for.")] = 32_768,
    kv_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of K/V, as the workers have it.")] = "auto",
    index_dtype: Annotated[str, typer.Option(metavar="NAME", help="Storage of index keys, likewise.")] = "auto",
    index_topk_freq: Annotated[
        int, typer.Option(metavar="N", min=0, help="As the workers have it; 0 = as config.json says.")
    ] = 0,
    index_topk_pattern: Annotated[str, typer.Option(metavar="LETTERS", help="As the workers have it.")] = "",
    index_skip_topk_offset: Annotated[int, typer.Option(metavar="N", min=0, help="As the workers have it.")] = 0,
    ucx_library: Annotated[
        str | None, typer.Option(metavar="FILE", envvar="PDKV_UCX_LIBRARY", help="The libucp to look at.")
    ] = None,
    control_keys: Annotated[
        Path | None,
        typer.Option(metavar="DIR", envvar="PDKV_CONTROL_KEYS", help="Folder of keys, as the workers have it."),
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Without keys: allow a peer beyond this machine.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Look for what would keep a worker from serving, and say how to mend it.

    With --peer it shakes hands with a running prefill worker as a decode worker would: manifests are compared, two
    patterned pages are read and checked, and the bandwidth is measured for several span sizes.
    """

    def run() -> int:
        from pdkv.daemons.doctor import DoctorOptions, doctor_settings  # noqa: PLC0415

        settings = doctor_settings(
            model,
            require_transport=require_transport,
            max_model_len=max_model_len,
            ucx_library=ucx_library,
            insecure=insecure,
            control_keys=control_keys,
        )
        settings = msgspec.structs.replace(
            settings,
            kv_dtype=kv_dtype,
            index_dtype=index_dtype,
            index_topk_freq=index_topk_freq,
            index_topk_pattern=index_topk_pattern,
            index_skip_topk_offset=index_skip_topk_offset,
        )
        return _examine(DoctorOptions(settings=settings, ports=_ports(), peer=peer, min_gbps=min_gbps), as_json)

    ending(run)


@app.command("describe", epilog=keep_lines(_DESCRIBE_EXAMPLES), context_settings=CONTEXT)
def describe(
    url: Annotated[str, typer.Argument(metavar="URL", help="HTTP address of a prefill or decode worker.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Show a worker's role, incarnation, manifest, pages, leases, and its peers with the paths to them."""

    def run() -> int:
        from pdkv.daemons.description import describe_worker, told  # noqa: PLC0415

        found = describe_worker(url)
        typer.echo(msgspec.json.encode(found).decode() if as_json else told(found))
        return 0

    ending(run)


def _examine(options: "DoctorOptions", as_json: bool) -> int:
    from pdkv.daemons.doctor import examine  # noqa: PLC0415
    from pdkv.daemons.logs import configure_logging  # noqa: PLC0415

    configure_logging("error", "doctor")
    found = examine(options)
    if as_json:
        typer.echo(msgspec.json.encode(found).decode())
    for check in () if as_json else found.checks:
        typer.echo(f"{_MARKS[check.status]} {check.id:<16} {check.evidence}")
        if check.fix and check.status in ("warn", "fail"):
            typer.echo(f"     {'':<16} -> {check.fix}")
    return UNFIT if found.failed else 0


def _ports() -> tuple[int, ...]:
    """Where the daemons listen unless told otherwise."""
    from pdkv.daemons.config import Address, DecodeConfig, PrefillConfig, RouterConfig  # noqa: PLC0415

    schemas = (RouterConfig, PrefillConfig, DecodeConfig)
    return tuple(Address(str(schema.model_fields["listen"].default)).port for schema in schemas)
