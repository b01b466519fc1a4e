"""Every ``pdkv`` command in the documents for operators is one that there is, with flags that it has."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from pdkv.cli import app

ROOT = Path(__file__).parents[2]
DOCUMENTS = ("docs/runbook.md", "docs/deploy.md", "docs/cache.md", "README.md")


def _commands(document: str) -> Iterator[str]:
    """Those in backquotes and those in blocks, without comments."""
    text = (ROOT / document).read_text(encoding="utf-8")
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.removeprefix(".venv/bin/").split(" #")[0] for block in fenced for line in block.splitlines()]
    quoted = re.findall(r"`(?:\.venv/bin/)?(pdkv [^`]+)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    yield from (line.strip() for line in (*lines, *quoted) if re.match(r"pdkv [a-z]", line))


COMMANDS = [(document, command) for document in DOCUMENTS for command in dict.fromkeys(_commands(document))]


def _parse(words: list[str]) -> None:
    """As the command line does, without running anything. What is left out (a URL, say) is no error here."""
    group: Any = typer.main.get_group(app)
    context: Any = group.make_context("pdkv", list(words))
    while words and hasattr(group, "resolve_command"):
        name, group, words = group.resolve_command(context, words)
        context = type(context)(group, parent=context, info_name=name)
    flags = {flag for parameter in group.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in words if word.startswith("--") and word.split("=")[0] not in flags]
    assert not unknown, f"no such flag: {unknown}"


@pytest.mark.parametrize(("document", "command"), COMMANDS)
def test_a_command_in_a_document_is_one_that_there_is(document: str, command: str) -> None:
    _parse([word for word in shlex.split(command)[1:] if word != "..."])


def test_what_there_is_not_is_noticed() -> None:
    assert len(COMMANDS) > 30
    with pytest.raises(AssertionError, match="no such flag"):
        _parse(["lease", "ls", "--all"])
    with pytest.raises(Exception, match="No such command"):
        _parse(["leases"])


def test_help_for_operators_is_short_has_examples_and_loads_nothing_heavy() -> None:
    commands = [
        "keys new",
        "keys show",
        "manifest show",
        "manifest diff",
        "lease ls",
        "lease release",
        "config explain",
        "ping",
        "drain",
        "top",
    ]
    program = f"""
import sys
from typer.testing import CliRunner
from pdkv.cli import app
for command in {commands}:
    told = CliRunner().invoke(app, [*command.split(), "--help"])
    assert told.exit_code == 0, told.output
    assert "Examples:" in told.output and len(told.output.splitlines()) <= 60, told.output
heavy = {{"torch", "starlette", "uvicorn", "rich"}} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
