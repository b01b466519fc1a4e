"""``pdkv metrics list``: the table of all metrics."""

from typing import Annotated

import msgspec
import typer

from pdkv.cli.lazy import CONTEXT, command_module, keep_lines
from pdkv.metric_table import TABLE
from pdkv.metrics import Metric

_SCHEMA = "pdkv.metrics/v1"
_EXAMPLES = """
Examples:

  pdkv metrics list
  pdkv metrics list --role decode --json
"""

app = command_module()
_metrics = typer.Typer(
    help="What daemons export at /metrics.", no_args_is_help=True, rich_markup_mode=None, context_settings=CONTEXT
)
app.add_typer(_metrics, name="metrics")
_metrics.callback()(lambda: None)


@_metrics.command("list", epilog=keep_lines(_EXAMPLES), context_settings=CONTEXT)
def list_metrics(
    role: Annotated[str, typer.Option(metavar="prefill|decode|router", help="Only what this role exports.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Print every metric: name, type, labels and help. All of them also have the label role."""
    chosen = [metric for metric in TABLE if not role or role in metric.roles]
    if not chosen:
        raise typer.BadParameter(f"{role!r} is none of prefill, decode, router", param_hint="--role")
    if as_json:
        typer.echo(msgspec.json.encode({"schema": _SCHEMA, "metrics": [_described(m) for m in chosen]}).decode())
        return
    rows = [(m.name, m.kind.value, ",".join(label.name for label in m.labels) or "-", m.help) for m in chosen]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, kind, labels, about in rows:
        typer.echo(f"{name:<{widths[0]}}  {kind:<{widths[1]}}  {labels:<{widths[2]}}  {about}")


def _described(metric: Metric) -> dict[str, object]:
    return {
        "name": metric.name,
        "type": metric.kind.value,
        "help": metric.help,
        "roles": metric.roles,
        "labels": {label.name: label.values for label in metric.labels},
        "buckets": metric.buckets,
    }
