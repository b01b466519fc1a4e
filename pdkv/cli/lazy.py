"""A command group that lists its subcommands without importing them, and shows errors as one line."""

import importlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from pdkv.errors import PdkvError

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Subcommand(NamedTuple):
    name: str
    module: str
    """Has an attribute ``app``, a Typer with a command of this name."""
    summary: str


class LazyGroup(TyperGroup):
    """``get_command`` gives placeholders, enough for help; ``resolve_command``, which runs one, the real thing."""

    subcommands: tuple[Subcommand, ...] = ()

    def list_commands(self, ctx: Any) -> list[str]:  # noqa: ARG002
        return [sub.name for sub in self.subcommands]

    def get_command(self, ctx: Any, cmd_name: str) -> Any:  # noqa: ARG002
        return next(
            (TyperCommand(sub.name, help=sub.summary) for sub in self.subcommands if sub.name == cmd_name), None
        )

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        name, placeholder, rest = super().resolve_command(ctx, args)
        if placeholder is None or name is None:
            return name, placeholder, rest
        module = next(sub.module for sub in self.subcommands if sub.name == name)
        group: Any = typer.main.get_group(importlib.import_module(module).app)
        return name, group.commands[name], rest


def application(about: str, subcommands: tuple[Subcommand, ...], epilog: str) -> typer.Typer:
    """The top of the command tree."""
    group = type("PdkvGroup", (LazyGroup,), {"subcommands": subcommands})
    app = typer.Typer(
        cls=group,
        help=about,
        epilog=keep_lines(epilog),
        context_settings=CONTEXT,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(lambda: None)
    return app


def command_module() -> typer.Typer:
    """The Typer of one module of subcommands; always a group, even with a single command in it."""
    app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False, add_completion=False)
    app.callback()(lambda: None)
    return app


def keep_lines(text: str) -> str:
    """Help text whose lines are not refilled."""
    return "\n\n".join("\b\n" + paragraph for paragraph in text.strip("\n").split("\n\n"))


def ending(run: Callable[[], int]) -> None:
    """Run a command's body and end with its exit code; an error of ours is one line on stderr."""
    try:
        code = run()
    except PdkvError as exc:
        sys.stderr.write(f"pdkv: error: {exc}\n")
        code = exc.exit_code
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)
