"""Write what `conceptshare COMMAND --help` prints of every command into command-line.md.

Run as `python docs/write_command_reference.py`.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.testing import CliRunner

from conceptshare.cli import app

PAGE = Path(__file__).parent / "command-line.md"
BEGIN, END = "<!-- commands -->\n", "<!-- end of commands -->\n"


def reference() -> str:
    """The commands, as Markdown."""
    return "\n".join(f"## `{name}`\n\n```text\n{_help(name)}```\n" for name in _commands(typer.main.get_command(app)))


def with_reference(text: str) -> str:
    """The page's text with its commands replaced."""
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n{reference()}\n{END}", text, flags=re.DOTALL)


def _commands(command: Any, name: str = "") -> Iterator[str]:
    """The names of all commands that do something, in the order of `--help`."""
    for part, below in getattr(command, "commands", {}).items():
        full = f"{name} {part}".strip()
        yield from _commands(below, full) if hasattr(below, "commands") else [full]


def _help(name: str) -> str:
    # Lines are as long as this says the terminal is wide.
    runner = CliRunner(env={"COLUMNS": "80"})
    return runner.invoke(app, [*name.split(), "--help"], prog_name="conceptshare").stdout


if __name__ == "__main__":
    PAGE.write_text(with_reference(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
