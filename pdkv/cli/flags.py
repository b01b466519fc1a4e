"""Flags made from a role's configuration schema, so that there is one list of names, defaults and descriptions."""

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings

from pdkv.cli.lazy import CONTEXT, ending, keep_lines
from pdkv.daemons.config import Flag, RoleConfig, flag_name, flag_of, load

Schema = TypeVar("Schema", bound=RoleConfig)

_SETTINGS_HELP = """
Every flag may also be set as PDKV_<NAME> in the environment or as a key of the YAML file.
"""


def role_command(
    app: typer.Typer, name: str, schema: type[Schema], run: Callable[[Schema], int], about: str, examples: str
) -> None:
    """Add the command ``name``: it loads the role's configuration and ends with the exit code of ``run``."""
    settings_command(
        app, name, schema, lambda flags, config_file, _: run(load(schema, flags, config_file)), about, examples
    )


def settings_command(
    app: typer.Typer,
    name: str,
    schema: type[RoleConfig],
    act: Callable[[Mapping[str, object], Path | None, bool], int],
    about: str,
    examples: str,
    *,
    with_json: bool = False,
) -> None:
    """Add the command ``name`` with a role's flags: it ends with the exit code of ``act``, which gets the flags that
    were given, by field, the YAML file, and whether JSON is wanted (only asked for ``with_json``)."""

    def command(**given: Any) -> None:
        config_file, as_json = given.pop("config"), given.pop("as_json", False)
        flags = {field: value for field, value in given.items() if value not in (None, [])}
        ending(lambda: act(flags, config_file, as_json))

    parameters = [_parameter(schema, field, info) for field, info in schema.model_fields.items()]
    config = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="YAML file with the settings below.")]
    everything = Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=_show_all, help="Show the advanced flags too.")
    ]
    keyword = inspect.Parameter.KEYWORD_ONLY
    parameters.insert(0, inspect.Parameter("config", keyword, default=None, annotation=config))
    parameters.append(inspect.Parameter("help_all", keyword, default=False, annotation=everything))
    if with_json:
        as_json = Annotated[bool, typer.Option("--json", help="One JSON object.")]
        parameters.append(inspect.Parameter("as_json", keyword, default=False, annotation=as_json))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    app.command(name, help=about, epilog=keep_lines(examples + _SETTINGS_HELP), context_settings=CONTEXT)(command)


def _parameter(schema: type[BaseSettings], field: str, info: FieldInfo) -> inspect.Parameter:
    flag = flag_of(schema, field)
    shown = "" if info.default in (PydanticUndefined, "", None, False) else f" [{info.default}]"
    options: dict[str, Any] = {"help": f"{info.description}{shown}", "hidden": flag.hidden or flag.advanced}
    kind: Any = str
    if isinstance(info.default, bool):
        kind = bool
    elif str(info.annotation).startswith("tuple"):
        kind = list[str]
        options["metavar"] = "URL"
    else:
        options["metavar"] = _metavar(info)
    annotation = Annotated[kind | None, typer.Option(flag_name(schema, field), show_default=False, **options)]
    return inspect.Parameter(field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(info: FieldInfo) -> str:
    """What the value looks like; the schema checks it, so that all sources are checked alike."""
    for told in (part.metavar for part in info.metadata if isinstance(part, Flag)):
        if told:
            return told
    choices = [choice for choice in getattr(info.annotation, "__args__", ()) if isinstance(choice, str)]
    for part in getattr(info.annotation, "__args__", ()):
        choices += [choice for choice in getattr(part, "__args__", ()) if isinstance(choice, str)]
    if choices:
        return "|".join(choices)
    kinds: dict[Any, str] = {int: "N", float: "SECONDS", Path: "DIR", Path | None: "DIR"}
    return kinds.get(info.annotation, "TEXT")


def _show_all(ctx: typer.Context, wanted: bool) -> None:
    if not wanted:
        return
    for parameter in ctx.command.params:
        field = parameter.name or ""
        if getattr(parameter, "hidden", False) and field != "reuse_port":
            parameter.hidden = False  # type: ignore[attr-defined]
    typer.echo(ctx.get_help())
    raise typer.Exit
