"""``pdkv config``: what a role would run with, without running it, and what its YAML file may say."""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import typer

from pdkv.cli.flags import settings_command
from pdkv.cli.lazy import CONTEXT, command_module, ending, keep_lines
from pdkv.daemons.config import DecodeConfig, PrefillConfig, RoleConfig, RouterConfig, UpConfig, flag_of, load
from pdkv.daemons.config_sources import Explained, explain

_SCHEMA = "pdkv.config/v1"
_ROLES: tuple[tuple[str, type[RoleConfig]], ...] = (
    ("prefill", PrefillConfig),
    ("decode", DecodeConfig),
    ("router", RouterConfig),
    ("up", UpConfig),
)

app = command_module()
_config = typer.Typer(
    help="Show or check the configuration of a role, without starting it.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
_show = typer.Typer(
    help="Print every setting of a role, its value and where that came from.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
_validate = typer.Typer(
    help="Check a role's configuration; exit code 2 says that it is wrong.",
    no_args_is_help=True,
    rich_markup_mode=None,
    context_settings=CONTEXT,
)
app.add_typer(_config, name="config")
_config.add_typer(_show, name="show")
_config.add_typer(_validate, name="validate")


def _shower(role: str, schema: type[RoleConfig]) -> Callable[[Mapping[str, object], Path | None, bool], int]:
    def show(flags: Mapping[str, object], config_file: Path | None, as_json: bool) -> int:
        explained = explain(schema, flags, config_file)
        if as_json:
            document = {"schema": _SCHEMA, "role": role, "settings": explained.settings}
            typer.echo(msgspec.json.encode(document).decode())
        else:
            typer.echo(_table(explained))
        if explained.error is not None:
            sys.stderr.write(f"pdkv: error: {explained.error}\n")
            return explained.error.exit_code
        return 0

    return show


def _validator(role: str, schema: type[RoleConfig]) -> Callable[[Mapping[str, object], Path | None, bool], int]:
    def validate(flags: Mapping[str, object], config_file: Path | None, _as_json: bool) -> int:
        load(schema, flags, config_file)
        typer.echo(f"ok: {role} would start with this configuration")
        return 0

    return validate


@_config.command(
    "schema",
    epilog=keep_lines("\nExamples:\n\n  pdkv config schema decode > decode.schema.json\n"),
    context_settings=CONTEXT,
)
def schema(role: Annotated[Literal["prefill", "decode", "router", "up"], typer.Argument(help="Whose file.")]) -> None:
    """Print the JSON Schema of a role's YAML file, for editors and for checks before a deployment."""
    typer.echo(json.dumps(_file_schema(role, dict(_ROLES)[role]), indent=2))


_EXPLAIN_EXAMPLES = """
Examples:

  pdkv config explain max_batch
  pdkv config explain --json -- --lease-ttl
  pdkv config explain PDKV_DRAIN_TIMEOUT
"""


@_config.command("explain", epilog=keep_lines(_EXPLAIN_EXAMPLES), context_settings=CONTEXT)
def explain_one(
    key: Annotated[str, typer.Argument(metavar="KEY", help="A key of the YAML file, a variable, or a flag behind --.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
) -> None:
    """Say what a setting means: its values, default, flag and variable, in every role that has it."""

    def run() -> int:
        from pdkv.daemons import config_keys  # noqa: PLC0415  not for --help

        found = config_keys.explain_key(key, _ROLES)
        typer.echo(msgspec.json.encode(found).decode() if as_json else config_keys.told(found))
        return 0

    ending(run)


def _file_schema(role: str, config: type[RoleConfig]) -> dict[str, Any]:
    """Nothing is required: flags and the environment may say it too."""
    made = config.model_json_schema()
    fields = made["properties"].items()
    shown = {name: field for name, field in fields if not flag_of(config, name).hidden}
    for field in shown.values():
        del field["title"]
        if "minLength" in field and field.get("type") == "array":  # pydantic says it of the text that it may be too
            field["minItems"] = field.pop("minLength")
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"The YAML file of pdkv {role}",
        "type": "object",
        "additionalProperties": False,
        "properties": shown,
    }


def _table(explained: Explained) -> str:
    rows = [
        (setting.name, bytes(setting.value).decode(), _origin(setting.source, setting.where))
        for setting in explained.settings
    ]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    return "\n".join(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for name, value, origin in rows)


def _origin(source: str, where: str) -> str:
    return f"{source} {where}".rstrip()


for _role, _role_schema in _ROLES:
    settings_command(
        _show,
        _role,
        _role_schema,
        _shower(_role, _role_schema),
        f"Print what 'pdkv {_role}' would run with.",
        f"\nExamples:\n\n  pdkv config show {_role} --config pdkv.yaml\n  pdkv config show {_role} --json\n",
        with_json=True,
    )
    settings_command(
        _validate,
        _role,
        _role_schema,
        _validator(_role, _role_schema),
        f"Check what 'pdkv {_role}' would run with.",
        f"\nExamples:\n\n  pdkv config validate {_role} --config pdkv.yaml\n",
    )
